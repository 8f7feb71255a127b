"""What happens next: a heap of actions by simulated time."""

import heapq
from collections.abc import Callable


class EventQueue:
    """Owns the simulated clock. Actions of one time run in the order they were put in."""

    __slots__ = ("_heap", "_num_put", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._num_put = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Has `action` run at `time_s`, or now where that has passed."""
        self._num_put += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._num_put, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def run_until(self, end_s: float) -> None:
        """Runs what is due up to and including `end_s`; the clock then stands at `end_s`."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= end_s:
            self.now_s, _, action = pop(heap)
            action()
        self.now_s = max(self.now_s, end_s)
