"""The table of ports between nodes in docs/deployment.md, read for firewalls.

Owns the reading; the table is the page's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from node_network import CLIENT, Connection, Opening

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
_TABLE = re.compile(r"<!-- ports:begin -->\n(.*)<!-- ports:end -->", re.DOTALL)
_HEADER = 2
_OUTSIDE = ("clients", "Prometheus")
_NODES = {
    "any node": ("head", "prefill", "decode"),
    "router": ("head",),
    "replica": ("prefill", "decode"),
}
"""The nodes that are more than what they are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Who connects to whom, at which ports; both sides in the page's words."""

    source: str
    target: str
    first_port: int
    last_port: int
    is_for_spans: bool
    """Whether only engines that span nodes need it."""

    def sources(self, addresses: Mapping[str, str]) -> tuple[str, ...]:
        """Those of the nodes' addresses, by what the nodes are called; or the client's."""
        if self.source in _OUTSIDE:
            return (CLIENT,)
        return tuple(addresses[name] for name in _nodes(self.source))

    def covers(self, connection: Connection, target: str, addresses: Mapping[str, str]) -> bool:
        return (
            target in _nodes(self.target)
            and connection.source in self.sources(addresses)
            and self.first_port <= connection.port <= self.last_port
        )


def read_rows(*, spans_nodes: bool = False) -> list[Row]:
    """The table's, with what engines that span nodes need or without.

    Raises ValueError where there is none.
    """
    found = _TABLE.search(PAGE.read_text())
    if found is None:
        raise ValueError(f"{PAGE} has no table of ports")
    lines = found.group(1).splitlines()[_HEADER:]
    rows = [_read_row(*(cell.strip() for cell in line.split("|")[1:5])) for line in lines]
    return [row for row in rows if spans_nodes or not row.is_for_spans]


def _read_row(source: str, target: str, ports: str, what: str) -> Row:
    first, _, last = ports.partition("-")
    return Row(
        source=source,
        target=target,
        first_port=int(first),
        last_port=int(last or first),
        is_for_spans="`nodes`" in what,
    )


def _nodes(role: str) -> tuple[str, ...]:
    return _NODES.get(role, (role,))


def openings(rows: Sequence[Row], target: str, addresses: Mapping[str, str]) -> list[Opening]:
    """What the firewall of a node lets in; `addresses` are the nodes' by what they are called."""
    return [
        Opening(sources=row.sources(addresses), first_port=row.first_port, last_port=row.last_port)
        for row in rows
        if target in _nodes(row.target)
    ]
