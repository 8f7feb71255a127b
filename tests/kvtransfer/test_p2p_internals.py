"""The connector's check of what it relies on: silent with the pinned versions, else one line."""

import pytest

from kvtransfer import p2p_internals
from kvtransfer.errors import InternalsChanged


def test_the_pinned_versions_have_every_name() -> None:
    p2p_internals.check_p2p_internals()


@pytest.mark.parametrize(
    ("relied_on", "line"),
    [
        ({"vllm.v1.gone:Thing": ()}, "vllm.v1.gone:Thing does not exist: pdserve needs vLLM"),
        ({"vllm.config:Gone": ()}, "vllm.config:Gone does not exist: pdserve needs vLLM"),
        (
            {"torch._C._distributed_c10d:ProcessGroupGloo": ("gone",)},
            "torch._C._distributed_c10d:ProcessGroupGloo has no gone: pdserve needs vLLM",
        ),
    ],
)
def test_a_missing_name_is_one_line(
    monkeypatch: pytest.MonkeyPatch, relied_on: dict[str, tuple[str, ...]], line: str
) -> None:
    monkeypatch.setattr(p2p_internals, "RELIED_ON", relied_on)
    with pytest.raises(InternalsChanged, match=line):
        p2p_internals.check_p2p_internals()


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")]
)
def test_vllm_finds_the_connector(role: str, kv_role: str) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvtransfer.config import kv_transfer_config

    options = kv_transfer_config(
        role,  # type: ignore[arg-type]
        engine_id="e1",
        lease_s=30,
        backends=(),
        connector="nccl",
    )
    config = KVTransferConfig(**options)
    assert (config.kv_role, config.engine_id) == (kv_role, "e1")
    found = KVConnectorFactory.get_connector_class(config)
    assert found.__name__ == "PdP2pConnector"
