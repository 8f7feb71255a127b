"""Nodes of a network that this machine makes up: namespaces with an address each, and a bridge.

Owns the namespaces, the bridge and the firewalls from start to end, and what the firewalls saw. The
machine itself is on the bridge too, as the client is.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "pdserve-br"
ADDRESS = "198.18.0.{}"
"""Of a range that is for tests of networks: nobody's."""
CLIENT = ADDRESS.format(1)

EPHEMERAL_PORTS = (40_000, 40_999)
"""What the kernel of a node chooses from. Not its default, so that nothing is let in by chance."""

TOOLS = ("ip", "nft", "nsenter", "setpriv", "unshare")

RULES = """
table inet pdserve {{
  set accepted {{ type ipv4_addr . inet_service; flags dynamic; size 65535; }}
  set refused {{ type ipv4_addr . inet_service; flags dynamic; size 65535; }}
  chain input {{
    type filter hook input priority 0; policy drop;
    iifname lo accept
    ct state established,related accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit }} accept
    {allowed}
    tcp flags & (syn | ack) == syn add @refused {{ ip saddr . tcp dport }}
    meta l4proto udp add @refused {{ ip saddr . udp dport }}
  }}
}}
"""
ALLOW = "ip saddr {{ {} }} tcp dport {{ {} }} add @accepted {{ ip saddr . tcp dport }} accept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a firewall lets in: TCP connections from these addresses to these ports."""

    sources: Sequence[str]
    first_port: int
    last_port: int


@dataclass(frozen=True, slots=True)
class Connection:
    """One that was asked for: from whom, and to which port."""

    source: str
    port: int


def why_not() -> str | None:
    """What this machine lacks for a network of its own; None if nothing."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if missing := [name for name in TOOLS if not shutil.which(name)]:
        return (
            f"there is no {' and no '.join(missing)} here (packages iproute2, nftables, util-linux)"
        )
    try:
        _run("unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "type", "veth")
    except RuntimeError as error:
        return f"network namespaces are not permitted: {error}"
    return None


class Network(contextlib.ExitStack):
    """Owns the bridge and the nodes' namespaces; leaving the context deletes them."""

    def __enter__(self) -> "Network":
        _delete_link(BRIDGE)  # A run before this one may have been killed.
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        self.callback(_delete_link, BRIDGE)
        _run("ip", "address", "add", f"{CLIENT}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        return self

    def add(self, number: int) -> "Namespace":
        """A node with an address of its own."""
        namespace = Namespace(number)
        namespace.delete()
        self.callback(namespace.delete)
        namespace.create(BRIDGE)
        return namespace


class Namespace:
    """One node's network. Its end of the cable is `eth0`; ours is called as the namespace is."""

    def __init__(self, number: int) -> None:
        self.name = f"pdserve-{number}"
        self.address = ADDRESS.format(number)

    def delete(self) -> None:
        # The cable by itself: a namespace outlives its name while connections in it end.
        _delete_link(self.name)
        if Path(f"/run/netns/{self.name}").exists():
            _run("ip", "netns", "del", self.name)

    def create(self, bridge: str) -> None:
        _run("ip", "netns", "add", self.name)
        veth = ("type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "link", "add", self.name, *veth)
        _run("ip", "link", "set", self.name, "master", bridge, "up")
        inside = ("ip", "-n", self.name)
        _run(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run(*inside, "link", "set", device, "up")
        setting = "/proc/sys/net/ipv4/ip_local_port_range"
        told = "{} {}".format(*EPHEMERAL_PORTS)
        _run("ip", "netns", "exec", self.name, "tee", setting, told=told)

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Nothing comes and nothing goes, and nobody is told."""
        _run("ip", "link", "set", self.name, "down")
        try:
            yield
        finally:
            _run("ip", "link", "set", self.name, "up")

    # What the node sends, our end of the cable receives.

    def num_bytes_sent(self) -> int:
        return self._counted("rx_bytes")

    def num_bytes_received(self) -> int:
        return self._counted("tx_bytes")

    def _counted(self, what: str) -> int:
        return int(Path(f"/sys/class/net/{self.name}/statistics/{what}").read_text())

    def fence(self, openings: Sequence[Opening]) -> None:
        """Lets in only what is told, over TCP, and keeps account of the rest."""
        allowed = [
            ALLOW.format(", ".join(each.sources), f"{each.first_port}-{each.last_port}")
            for each in openings
        ]
        rules = RULES.format(allowed="\n    ".join(allowed))
        _run("ip", "netns", "exec", self.name, "nft", "-f", "-", told=rules)

    def accepted(self) -> frozenset[Connection]:
        return self._seen("accepted")

    def refused(self) -> frozenset[Connection]:
        return self._seen("refused")

    def _seen(self, which: str) -> frozenset[Connection]:
        command = ("nft", "--json", "list", "set", "inet", "pdserve", which)
        listed = json.loads(_run("ip", "netns", "exec", self.name, *command))["nftables"]
        (found,) = (each["set"] for each in listed if "set" in each)
        return frozenset(Connection(*each["concat"]) for each in found.get("elem", ()))


def _delete_link(name: str) -> None:
    if Path(f"/sys/class/net/{name}").exists():
        _run("ip", "link", "del", name)


def _run(*command: str, told: str | None = None) -> str:
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
