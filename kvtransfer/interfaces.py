"""Which of a host's network interfaces the libraries below an engine may listen at: the cluster's.

Left to themselves UCX listens at every address of its host, and Gloo and NCCL choose one that need
not be the cluster's. RDMA devices are none of these: who may reach them is up to the fabric. Owns
the names of the environment variables, never the environment.
"""

import ipaddress
from collections.abc import Mapping

import psutil

Interfaces = Mapping[str, tuple[str, ...]]
"""The IP addresses of each interface that is up."""


def observe_interfaces() -> Interfaces:
    """Those of this host."""
    states = psutil.net_if_stats()
    found: dict[str, tuple[str, ...]] = {}
    for name, entries in psutil.net_if_addrs().items():
        addresses = tuple(
            entry.address.partition("%")[0] for entry in entries if _is_ip(entry.address)
        )
        if addresses and states[name].isup:
            found[name] = addresses
    return found


def interface_env(host: str, interfaces: Interfaces) -> dict[str, str]:
    """Environment that keeps an engine to the interface with the address `host`.

    Empty where no interface has it, as behind a translation of addresses.
    """
    name = next((name for name, addresses in interfaces.items() if host in addresses), None)
    if name is None:
        return {}
    env = {"VLLM_HOST_IP": host, "GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    if others := sorted(interfaces.keys() - {name}):
        # What it may not use, so that RDMA devices, which have other names, stay in use.
        env["UCX_NET_DEVICES"] = "^" + ",".join(others)
    return env


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return True
