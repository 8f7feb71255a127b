"""How long a prompt's KV is on its way from a prefill replica to each decode replica. Pure.

Owns what was measured: of each pair, of all pairs within a node and of all between nodes, and of
all. A pair that was not seen lately is taken for one of its kind, so that one that was slow once is
tried again. Times are arguments.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from router.transfer_fit import Reads, TransferCost, TransferFit

STALE_S = 60.0
"""What was measured longer ago says nothing any more."""
WITHIN_NODE = 0.5
"""Of what reads take on average, that one within a node is thought to take where none was seen: it
is likely to be shorter, and tried then."""
PAIR_TRUST = 1.0
"""How many reads of a pair weigh as much as what others of its kind take."""


@dataclass(eq=False, slots=True)
class _Measured:
    """A pair, or a kind of pairs."""

    fit: TransferFit
    cost: TransferCost
    """As fitted so far."""
    observed_s: float

    def observe(self, reads: Reads, prior: TransferCost, now_s: float) -> None:
        self.cost = self.fit.observe(reads, prior)
        self.observed_s = now_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferEstimate:
    """What one prompt's KV takes to decode replicas. For one decision: it is a view, not a copy."""

    num_bytes: float
    """Of one rank's read."""
    num_steps: float
    """Of decode, over which the answer spreads what it has waited."""
    near: Collection[str]
    """Replicas on the node where the KV is."""
    near_s: float
    far_s: float
    """To a decode replica of which nothing else is known, there and elsewhere."""
    measured: Mapping[str, _Measured] = field(default_factory=dict)
    since_s: float = 0.0
    """What was measured before is not used."""

    def seconds(self, decode: str) -> float:
        """Until the KV is there, from when it is asked for."""
        pair = self.measured.get(decode)
        if pair is not None and pair.observed_s >= self.since_s:
            return pair.cost.fixed_s + pair.cost.per_byte_s * self.num_bytes
        return self.near_s if decode in self.near else self.far_s

    def step_share_s(self, decode: str) -> float:
        """The same in the unit of decode's work: seconds of each step."""
        return self.seconds(decode) / self.num_steps


class Transfers:
    """What is known of the ways between replicas. Owns it; replicas are to be named as they come
    and go."""

    def __init__(self) -> None:
        self._nodes: dict[str, str | None] = {}
        """By replica; None where that is not known."""
        self._on_node: dict[str, set[str]] = {}
        self._pairs: dict[str, dict[str, _Measured]] = {}
        """By prefill replica and decode replica."""
        self._kinds: dict[bool, _Measured] = {}
        """By whether both are on one node."""
        self._all = TransferFit()
        self._overall = TransferCost()

    def insert(self, replica_id: str, node_id: str | None) -> None:
        """A replica has joined."""
        self._nodes[replica_id] = node_id
        if node_id is not None:
            self._on_node.setdefault(node_id, set()).add(replica_id)

    def remove(self, replica_id: str) -> None:
        """A replica has left."""
        node_id = self._nodes.pop(replica_id, None)
        if node_id is not None:
            self._on_node[node_id].discard(replica_id)
            if not self._on_node[node_id]:
                del self._on_node[node_id]
        self._pairs.pop(replica_id, None)
        for decodes in self._pairs.values():
            decodes.pop(replica_id, None)

    def observe(self, reads: Reads, *, prefill: str, decode: str, now_s: float) -> None:
        """A decode replica has read from a prefill replica."""
        if prefill not in self._nodes or decode not in self._nodes:
            return
        overall = self._overall = self._all.observe(reads, TransferCost())
        is_near = self._is_near(prefill, decode)
        if (kind := self._kinds.get(is_near)) is None:
            kind = self._kinds[is_near] = _Measured(TransferFit(), overall, now_s)
        kind.observe(reads, overall, now_s)
        decodes = self._pairs.setdefault(prefill, {})
        pair = decodes.get(decode)
        if pair is None or pair.observed_s < now_s - STALE_S:
            fit = TransferFit(trust=PAIR_TRUST)
            pair = decodes[decode] = _Measured(fit, kind.cost, now_s)
        pair.observe(reads, kind.cost, now_s)

    def estimate(
        self, prefill: str, *, num_bytes: float, num_steps: float, now_s: float
    ) -> TransferEstimate:
        """What so much KV of a prefill replica takes, for an answer of so many steps."""
        since_s = now_s - STALE_S
        node_id = self._nodes.get(prefill)
        return TransferEstimate(
            num_bytes=num_bytes,
            num_steps=num_steps,
            near=self._on_node.get(node_id, ()) if node_id is not None else (),
            near_s=self.cost(is_near=True, since_s=since_s).seconds(num_bytes),
            far_s=self.cost(is_near=False, since_s=since_s).seconds(num_bytes),
            measured=self._pairs.get(prefill, {}),
            since_s=since_s,
        )

    def cost(self, *, is_near: bool, since_s: float) -> TransferCost:
        """Of a pair of which nothing else is known, within a node or between two."""
        kind = self._kinds.get(is_near)
        if kind is not None and kind.observed_s >= since_s:
            return kind.cost
        return self._overall.times(WITHIN_NODE) if is_near else self._overall

    def measured(self) -> Iterator[tuple[bool, TransferCost]]:
        """What reads take within a node (true) and between two, where some were seen."""
        for is_near, kind in self._kinds.items():
            yield is_near, kind.cost

    def _is_near(self, prefill: str, decode: str) -> bool:
        node_id = self._nodes.get(prefill)
        return node_id is not None and node_id == self._nodes.get(decode)
