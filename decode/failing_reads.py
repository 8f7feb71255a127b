"""From which prefill engines a decode engine cannot read any more, though it once could. Pure.

Owns how many reads of each have failed in a row.
"""

from collections.abc import Iterable

from kvtransfer.stats import PairDelta

MOST_IN_A_ROW = 4
"""Two requests: each has two attempts."""


class FailingReads:
    """Tells a pair that does not work from a read that went wrong."""

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}

    def observe(self, moved: Iterable[PairDelta]) -> tuple[str, ...]:
        """Takes in what was read since the last call; returns the engines to be left alone.

        Each is named once for so many failures: whoever is told knows what to do.
        """
        for delta in moved:
            engine_id = delta.remote_engine_id
            if delta.num_transfers:
                self._in_a_row.pop(engine_id, None)
            elif delta.num_failures:
                before = self._in_a_row.get(engine_id, 0)
                self._in_a_row[engine_id] = before + delta.num_failures
        failing = tuple(key for key, num in self._in_a_row.items() if num >= MOST_IN_A_ROW)
        for engine_id in failing:
            del self._in_a_row[engine_id]
        return failing

    def forget(self, engine_ids: Iterable[str]) -> None:
        """These engines will not come back."""
        for engine_id in engine_ids:
            self._in_a_row.pop(engine_id, None)
