"""Where an engine's libraries may listen, from what a host has."""

import pytest

from kvtransfer.interfaces import Interfaces, interface_env, observe_interfaces

HOST: Interfaces = {
    "lo": ("127.0.0.1", "::1"),
    "eth0": ("10.0.0.5", "fd00::5"),
    "eth1": ("192.168.1.5",),
}


@pytest.mark.parametrize(
    ("host", "interfaces", "env"),
    [
        pytest.param(
            "10.0.0.5",
            HOST,
            {
                "VLLM_HOST_IP": "10.0.0.5",
                "GLOO_SOCKET_IFNAME": "eth0",
                "NCCL_SOCKET_IFNAME": "=eth0",
                "UCX_NET_DEVICES": "^eth1,lo",
            },
            id="one of several",
        ),
        pytest.param(
            "::1",
            HOST,
            {
                "VLLM_HOST_IP": "::1",
                "GLOO_SOCKET_IFNAME": "lo",
                "NCCL_SOCKET_IFNAME": "=lo",
                "UCX_NET_DEVICES": "^eth0,eth1",
            },
            id="loopback",
        ),
        pytest.param(
            "127.0.0.1",
            {"lo": ("127.0.0.1",)},
            {
                "VLLM_HOST_IP": "127.0.0.1",
                "GLOO_SOCKET_IFNAME": "lo",
                "NCCL_SOCKET_IFNAME": "=lo",
            },
            id="nothing else to leave out",
        ),
        pytest.param("203.0.113.1", HOST, {}, id="behind a translation"),
    ],
)
def test_what_is_told(host: str, interfaces: Interfaces, env: dict[str, str]) -> None:
    assert interface_env(host, interfaces) == env


def test_this_host_has_a_loopback() -> None:
    assert any("127.0.0.1" in addresses for addresses in observe_interfaces().values())
