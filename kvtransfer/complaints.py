"""What is logged of strangers who connect: little, however often they do.

Owns when each was last complained of. Whoever can connect can do so in a loop, and must not fill a
disk with that.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_S = 10.0
"""Between two lines about one address."""
MAX_ADDRESSES = 16
"""Those that have lines of their own at a time; all others have one together."""
_OTHERS = "other addresses"


@dataclass(slots=True)
class _Told:
    at_s: float
    num_left_out: int = 0


class Complaints:
    """Picks what is worth a line. From any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[str, _Told] = {}

    def line(self, address: str, text: str) -> str | None:
        """What is to be logged now, if anything."""
        now_s = self._clock()
        with self._lock:
            key = self._key(address, now_s)
            told = self._told.get(key)
            if told is not None and now_s - told.at_s < INTERVAL_S:
                told.num_left_out += 1
                return None
            self._told[key] = _Told(now_s)
        line = f"{address}: {text}"
        if told is not None and told.num_left_out:
            line += f" (and {told.num_left_out} more from {key} since the last line)"
        return line

    def _key(self, address: str, now_s: float) -> str:
        if address in self._told:
            return address
        if len(self._told) > MAX_ADDRESSES:
            self._told = {
                key: told for key, told in self._told.items() if now_s - told.at_s < INTERVAL_S
            }
        return address if len(self._told) < MAX_ADDRESSES else _OTHERS
