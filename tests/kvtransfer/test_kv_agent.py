"""What a new agent finds in its environment."""

import os
import uuid

import pytest
from nixl._api import nixl_agent, nixl_agent_config

from kvtransfer.agent import CPU_UCX_SETTINGS, replace_spinning_agent


@pytest.mark.parametrize(
    ("device_type", "expected"),
    [
        ("cpu", CPU_UCX_SETTINGS | {"UCX_CMA_TX_QUOTA": "16"}),
        ("cuda", {"UCX_CMA_TX_QUOTA": "16"}),
    ],
)
def test_settings_of_ucx_give_way_to_the_operators(
    monkeypatch: pytest.MonkeyPatch, device_type: str, expected: dict[str, str]
) -> None:
    for name in CPU_UCX_SETTINGS:
        # Set first, so that what the agent sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("UCX_CMA_TX_QUOTA", "16")
    wrapper = nixl_agent(str(uuid.uuid4()), nixl_agent_config())
    spinning = wrapper.agent
    replace_spinning_agent(wrapper, device_type)
    assert wrapper.agent is not spinning
    assert {name: os.environ[name] for name in CPU_UCX_SETTINGS if name in os.environ} == expected
