"""How much work one replica has, by who has sent it. Pure.

A router knows what it sent itself. What it is told, and how often, is here.
"""

from typing import Generic, TypeVar

LOAD_INTERVAL_S = 0.25
"""How often routers that get no outputs hear of a changed load."""

SenderT = TypeVar("SenderT")


class OutstandingWork(Generic[SenderT]):
    """Predicted seconds of what has not ended, of each sender. Owns them."""

    def __init__(self) -> None:
        self._work_s: dict[SenderT, float] = {}

    @property
    def total_s(self) -> float:
        return sum(self._work_s.values())

    def others_s(self, sender: SenderT) -> float:
        """What all but this one have sent."""
        return max(0.0, self.total_s - self._work_s.get(sender, 0.0))

    def add(self, sender: SenderT, work_s: float) -> None:
        """A request was taken."""
        self._work_s[sender] = self._work_s.get(sender, 0.0) + work_s

    def complete(self, sender: SenderT, work_s: float) -> None:
        """A request has ended, by itself or not."""
        # Floats do not quite add up to nothing.
        self._work_s[sender] = max(0.0, self._work_s.get(sender, 0.0) - work_s)

    def forget(self, sender: SenderT) -> None:
        """A sender is gone."""
        self._work_s.pop(sender, None)
