"""What a new agent finds in its environment."""

import os
import sys
import uuid
from typing import Any

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
    replace_spinning_agent(wrapper, device_type)
    assert {name: os.environ[name] for name in CPU_UCX_SETTINGS if name in os.environ} == expected


@pytest.mark.parametrize(
    ("device_type", "asked_us", "expected_us"),
    [
        ("cpu", None, [10_000]),
        ("cpu", 0, []),
        ("cuda", None, []),
        ("cuda", 1000, [1000]),
    ],
)
def test_an_agent_is_replaced_where_its_delay_is_not_nixls_own(
    monkeypatch: pytest.MonkeyPatch,
    device_type: str,
    asked_us: int | None,
    expected_us: list[int],
) -> None:
    for name, setting in CPU_UCX_SETTINGS.items():
        monkeypatch.setenv(name, setting)
    wrapper = nixl_agent(str(uuid.uuid4()), nixl_agent_config())
    before = wrapper.agent
    bindings = sys.modules[type(wrapper).__module__].nixlBind
    new_agent = bindings.nixlAgent
    delays_us: list[int] = []

    def noted(name: str, config: Any) -> Any:
        delays_us.append(config.pthrDelay)
        return new_agent(name, config)

    monkeypatch.setattr(bindings, "nixlAgent", noted)
    replace_spinning_agent(wrapper, device_type, asked_us)
    assert delays_us == expected_us
    assert (wrapper.agent is before) == (not expected_us)
