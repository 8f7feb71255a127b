"""Which prefill and decode replicas cannot exchange KV now. Pure.

A pair is ready unless it stands here: where all are ready, which is the rule, this is empty and
costs nothing, however many replicas there are. Times are arguments.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

FIRST_RETRY_S = 1.0
MOST_RETRY_S = 30.0
"""The wait before a pair is tried again doubles with each failure, up to this."""
PROBATION_S = 300.0
"""A pair that fails again within this of having become ready has not got well: its failures add
up."""
PATIENCE_S = 2.0
"""Pairs that take longer do not keep out a replica that has one that is ready: most take tens of
milliseconds."""
AT_LATEST_S = 30.0
"""A decode replica waits no longer for its first pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two replicas, by id."""

    prefill: str
    decode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unready:
    """Why a pair is not used, and until when."""

    problem: str | None = None
    """What keeps it apart, in one line; None where it has not been tried yet."""
    num_failures: int = 0
    retry_s: float | None = None
    """When it is tried again; None while it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cured:
    num_failures: int
    at_s: float


class Pairs:
    """The pairs that are not ready. Owns them; replicas that it was not told of have none."""

    def __init__(self) -> None:
        self._unready: dict[str, dict[str, Unready]] = {}
        """By prefill replica and decode replica; none is empty."""
        self._cured: dict[Pair, _Cured] = {}
        """Those that had failed and are ready."""

    def __len__(self) -> int:
        return sum(len(decodes) for decodes in self._unready.values())

    def __iter__(self) -> Iterator[tuple[Pair, Unready]]:
        for prefill, decodes in self._unready.items():
            for decode, unready in decodes.items():
                yield Pair(prefill=prefill, decode=decode), unready

    # What routing asks.

    def barred(self, prefill: str) -> Set[str]:
        """Decode replicas that cannot read from a prefill replica now."""
        return self._unready[prefill].keys() if prefill in self._unready else frozenset()

    def stranded(self, open_decodes: Set[str]) -> Set[str]:
        """Prefill replicas from which none of these decode replicas can read now."""
        if not self._unready or not open_decodes:
            return frozenset()
        num_open = len(open_decodes)
        return {
            prefill
            for prefill, barred in self._unready.items()
            if len(barred) >= num_open and open_decodes <= barred.keys()
        }

    def problem(self, pair: Pair) -> str | None:
        """What keeps a pair apart, if anything is known to."""
        unready = self._unready.get(pair.prefill, {}).get(pair.decode)
        return unready.problem if unready is not None else None

    # What warming up says.

    def is_ready(self, pair: Pair) -> bool:
        return pair.decode not in self.barred(pair.prefill)

    def trying(self, pair: Pair) -> None:
        """It is being made ready, and not used before it is."""
        before = self._unready.get(pair.prefill, {}).get(pair.decode, Unready())
        self._put(pair, replace(before, retry_s=None))

    def ready(self, pair: Pair, now_s: float) -> None:
        decodes = self._unready.get(pair.prefill, {})
        before = decodes.pop(pair.decode, None)
        if not decodes:
            self._unready.pop(pair.prefill, None)
        if before is not None and before.num_failures:
            self._cured[pair] = _Cured(num_failures=before.num_failures, at_s=now_s)

    def failed(self, pair: Pair, problem: str, now_s: float) -> None:
        """It could not be made ready, or was ready and is no longer."""
        before = self._unready.get(pair.prefill, {}).get(pair.decode)
        num_failures = 1 + (before.num_failures if before else self._relapse(pair, now_s))
        wait_s = min(MOST_RETRY_S, FIRST_RETRY_S * 2 ** min(num_failures - 1, 10))
        self._put(pair, Unready(problem=problem, num_failures=num_failures, retry_s=now_s + wait_s))

    def due(self, now_s: float) -> tuple[Pair, ...]:
        """Those that are to be tried again."""
        return tuple(
            Pair(prefill=prefill, decode=decode)
            for prefill, decodes in self._unready.items()
            for decode, unready in decodes.items()
            if unready.retry_s is not None and unready.retry_s <= now_s
        )

    def forget(self, replica_id: str) -> None:
        """A replica has left, or tries to join anew."""
        self._unready.pop(replica_id, None)
        for prefill, decodes in list(self._unready.items()):
            decodes.pop(replica_id, None)
            if not decodes:
                del self._unready[prefill]
        for pair in [pair for pair in self._cured if replica_id in (pair.prefill, pair.decode)]:
            del self._cured[pair]

    def _relapse(self, pair: Pair, now_s: float) -> int:
        cured = self._cured.pop(pair, None)
        return cured.num_failures if cured and now_s - cured.at_s <= PROBATION_S else 0

    def _put(self, pair: Pair, unready: Unready) -> None:
        self._unready.setdefault(pair.prefill, {})[pair.decode] = unready


def may_join(
    *, is_prefill: bool, num_ready: int, num_trying: int, num_failed: int, waited_s: float
) -> bool:
    """Whether a new replica gets traffic, by what has become of its pairs so far.

    A decode replica that no prefill can reach still does whole requests; a prefill replica that
    reaches no decode is of no use.
    """
    if not is_prefill and waited_s >= AT_LATEST_S:
        return True
    if num_trying:
        return num_ready > 0 and waited_s >= PATIENCE_S
    return num_ready > 0 or num_failed == 0 or not is_prefill
