"""The check at start: silent with the pinned versions, one clear line without a name."""

import pytest

from kvtransfer import internals
from kvtransfer.config import kv_transfer_config
from kvtransfer.errors import InternalsChanged


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
