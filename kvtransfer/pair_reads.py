"""How much is read of one peer at once, and when its silence is taken for its end.

Owns the account of a pair's reads, and those that wait their turn. Never posts a read, asks a peer
or ends a connection: whoever reads does, by what `judge` says.

A slow read is no fault: with many of them under way each takes long, and every one that is given
up would be computed instead, by engines that are busy as it is. So time alone gives up nothing. A
peer that is silent is asked for eight bytes over the same connection; it is gone when these have
not come either, after a time in which all that is under way before them would have.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar

Read = TypeVar("Read")

READ_TIMEOUT_S = 5.0
"""Unless `read_timeout_s` says otherwise."""

BYTES_AT_ONCE = 1 << 30
"""Tens of milliseconds of a fast network. What more is asked for waits: the first then have their
blocks sooner, and the last not later, than if all shared the way."""

_SLOWEST_BYTES_PER_S = 50e6
"""Half of what a gigabit network moves: what a pair is taken for of which nothing is known."""
_MARGIN = 4.0
"""Several pairs share a network card: the next reads may have a fraction of the last ones' rate."""
_LOST_AFTER = 10.0
"""Timeouts after which a peer that answers, and of whose blocks none arrives, is given up."""
_MEMORY = 0.9
"""Of the bytes and seconds so far, what still counts with the next read's."""


class Silence(Enum):
    """What is to be done about a peer that is being read."""

    NONE = auto()
    """It is heard of, or there is nothing to hear."""
    ASK = auto()
    """It has been silent for long: it is asked for a sign of life."""
    GONE = auto()
    """It does not answer, or answers and moves nothing: its reads are given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """The same for every peer of an engine."""

    timeout_s: float = READ_TIMEOUT_S
    """For how long a peer may be silent before it is asked, and then again before it has answered;
    there beside what the bytes under way take."""
    bytes_at_once: int = BYTES_AT_ONCE


class PairReads(Generic[Read]):
    """The reads of one peer. Owns those that wait, in order, and the account of those under way.

    Times are seconds of one clock.
    """

    def __init__(self, limits: ReadLimits) -> None:
        self._limits = limits
        self.waiting: deque[Read] = deque()
        self._num_bytes: dict[str, int] = {}
        """Under way, by request; 0 where only the lease is still to be read."""
        self._moved_bytes, self._moved_in_s = 0.0, 0.0
        self._moved_s = 0.0
        """When blocks last arrived, or began to be read."""
        self._answered_s = 0.0
        self._asked_s: float | None = None

    @property
    def is_idle(self) -> bool:
        return not self._num_bytes

    @property
    def has_room(self) -> bool:
        """Whether one more read may begin, of whatever size."""
        return self._bytes_under_way < self._limits.bytes_at_once

    @property
    def answer_timeout_s(self) -> float:
        """In which a peer that is there answers: behind all that is under way."""
        seconds_per_byte = 1 / _SLOWEST_BYTES_PER_S
        if self._moved_bytes:
            measured = self._moved_in_s / self._moved_bytes
            seconds_per_byte = min(seconds_per_byte, _MARGIN * measured)
        return self._limits.timeout_s + self._bytes_under_way * seconds_per_byte

    @property
    def _lost_after_s(self) -> float:
        """In which something has arrived even where the network is not what it was."""
        slowest_s = self._bytes_under_way / _SLOWEST_BYTES_PER_S
        return _LOST_AFTER * (self._limits.timeout_s + slowest_s)

    @property
    def _bytes_under_way(self) -> int:
        return sum(self._num_bytes.values())

    def began(self, request_id: str, num_bytes: int, now_s: float) -> None:
        """A read was posted, or a further part of it."""
        if self.is_idle:
            self._moved_s = now_s
        self._num_bytes[request_id] = self._num_bytes.get(request_id, 0) + num_bytes

    def moved(self, request_id: str, num_bytes: int, seconds: float, now_s: float) -> None:
        """So much of a read has arrived."""
        self._moved_bytes = _MEMORY * self._moved_bytes + num_bytes
        self._moved_in_s = _MEMORY * self._moved_in_s + seconds
        self._moved_s = now_s
        self._num_bytes[request_id] = max(0, self._num_bytes.get(request_id, 0) - num_bytes)

    def ended(self, request_id: str) -> None:
        """Nothing of this read is under way any more, whatever became of it."""
        self._num_bytes.pop(request_id, None)

    def asked(self, now_s: float) -> None:
        self._asked_s = now_s

    def answered(self, now_s: float) -> None:
        """The peer is there, and what it was asked has come."""
        self._answered_s, self._asked_s = now_s, None

    def reset(self) -> None:
        """The connection has ended, and with it what was asked."""
        self._asked_s = None
        self._num_bytes.clear()

    def judge(self, now_s: float) -> Silence:
        if self.is_idle:
            return Silence.NONE
        if now_s - self._moved_s > self._lost_after_s:
            return Silence.GONE
        if self._asked_s is not None:
            silent_s = now_s - max(self._asked_s, self._moved_s)
            return Silence.GONE if silent_s > self.answer_timeout_s else Silence.NONE
        silent_s = now_s - max(self._moved_s, self._answered_s)
        return Silence.ASK if silent_s > self._limits.timeout_s else Silence.NONE
