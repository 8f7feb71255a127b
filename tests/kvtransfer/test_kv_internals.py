"""The check at start: silent with the pinned versions, one clear line without a name."""

from types import SimpleNamespace

import pytest

from kvtransfer import internals
from kvtransfer.config import kv_transfer_config, transfer_env
from kvtransfer.errors import InternalsChanged
from kvtransfer.nixl import num_dropped_tokens


def test_the_pinned_versions_have_every_name() -> None:
    internals.check_internals()


@pytest.mark.parametrize(
    ("relied_on", "line"),
    [
        ({"vllm.v1.gone:Thing": ()}, "vllm.v1.gone:Thing does not exist: pdserve needs vLLM"),
        ({"vllm.v1.request:Gone": ()}, "vllm.v1.request:Gone does not exist: pdserve needs vLLM"),
        (
            {"nixl._bindings:nixlAgentConfig": ("gone",)},
            "nixl._bindings:nixlAgentConfig has no gone: pdserve needs nixl",
        ),
    ],
)
def test_a_missing_name_is_one_line(
    monkeypatch: pytest.MonkeyPatch, relied_on: dict[str, tuple[str, ...]], line: str
) -> None:
    monkeypatch.setattr(internals, "RELIED_ON", relied_on)
    with pytest.raises(InternalsChanged, match=line):
        internals.check_internals()


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")]
)
def test_vllm_takes_the_config(role: str, kv_role: str) -> None:
    from vllm.config import KVTransferConfig

    config = KVTransferConfig(
        **kv_transfer_config(role, engine_id="e1", lease_s=30, backends=["UCX"])  # type: ignore[arg-type]
    )
    assert (config.kv_role, config.engine_id) == (kv_role, "e1")
    assert config.get_from_extra_config("kv_lease_duration", None) == 30


def test_recurrent_state_lies_so_that_it_can_be_read_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout

    layout = get_conv_state_layout.__wrapped__
    monkeypatch.delenv("VLLM_SSM_CONV_STATE_LAYOUT", raising=False)
    assert layout() != "DS", "vLLM asserts it where KV is read by NIXL"
    for name, value in transfer_env("127.0.0.1").items():
        monkeypatch.setenv(name, value)
    assert layout() == "DS"


@pytest.mark.parametrize(
    ("has_mamba", "num_replayed", "num_dropped"),
    [(False, 0, 0), (True, 0, 1), (False, 128, 1)],
    ids=["attention", "recurrent", "replayed"],
)
def test_how_many_tokens_of_a_prompt_are_left_to_decode(
    has_mamba: bool, num_replayed: int, num_dropped: int
) -> None:
    """Drafts of several modules are in tests/engine/test_scheduler_pairs.py."""
    spec = SimpleNamespace(prefix_replay_tokens=num_replayed)
    cache = SimpleNamespace(
        has_mamba_layers=has_mamba, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]
    )
    config = SimpleNamespace(num_prefill_lookahead_tokens=0)
    assert num_dropped_tokens(config, cache) == num_dropped
