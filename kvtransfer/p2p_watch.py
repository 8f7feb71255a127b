"""Limits of time for calls that have none: NCCL's wait for their peer for ever.

Owns the threads that this takes. Never knows what is called.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from kvtransfer.p2p_errors import PairBroken, PairError, PairTimeout

_log = logging.getLogger(__name__)

Made = TypeVar("Made")


class Watch:
    """Calls `give_up`, once, when what it watches makes no progress for `timeout_s`.

    Owns the thread that waits for that.
    """

    def __init__(self, timeout_s: float, give_up: Callable[[], None]) -> None:
        self._timeout_s, self._give_up = timeout_s, give_up
        self._changed = threading.Condition()
        self._until_s: float | None = None
        self._stopped = False
        self._gave_up_s: float | None = None
        threading.Thread(target=self._run, daemon=True, name="kv-watch").start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What is done meanwhile is watched. Raises PairTimeout where it was given up."""
        self.progress()
        try:
            yield
        except PairError:
            self.check()  # What was given up fails in ways of its own.
            raise
        finally:
            with self._changed:
                self._until_s = None
        self.check()

    def progress(self) -> None:
        """The next step begins: it has the whole time again. Raises PairTimeout as `check`."""
        with self._changed:
            self._check()
            self._until_s = time.monotonic() + self._timeout_s
            self._changed.notify()

    def check(self) -> None:
        """Raises PairTimeout where it was given up."""
        with self._changed:
            self._check()

    def overdue_s(self) -> float:
        """For how long what was given up has gone on all the same; 0 where it has not."""
        with self._changed:
            if self._gave_up_s is None or self._until_s is None:
                return 0.0
            return time.monotonic() - self._gave_up_s

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _check(self) -> None:
        if self._gave_up_s is not None:
            raise PairTimeout(f"no progress for {self._timeout_s:g} s")

    def _run(self) -> None:
        with self._changed:
            while not self._stopped:
                now_s = time.monotonic()
                if self._until_s is not None and self._until_s <= now_s:
                    self._gave_up_s = now_s
                    break
                self._changed.wait(None if self._until_s is None else self._until_s - now_s)
        if self._gave_up_s is not None:
            self._give_up()


class LimitedCalls:
    """Calls that may never return. Owns those that were given up and are still in their threads."""

    def __init__(self, *, most_given_up: int) -> None:
        self._most_given_up = most_given_up
        self._lock = threading.Lock()
        self._num_given_up = 0

    def within(
        self, timeout_s: float, call: Callable[[], Made], undo: Callable[[Made], None]
    ) -> Made:
        """What `call` returns; `undo` is for what it returns too late.

        Raises PairTimeout, what it raises, or PairBroken where too many have never returned.
        """
        with self._lock:
            if self._num_given_up >= self._most_given_up:
                raise PairBroken(
                    f"{self._num_given_up} calls have not returned: this engine wants a restart"
                )
        made: Future[Made] = Future()
        thread = threading.Thread(
            target=self._run, args=(made, call, undo), daemon=True, name="kv-limited"
        )
        thread.start()
        try:
            return made.result(timeout_s)
        except TimeoutError:
            with self._lock:
                if made.cancel():
                    self._num_given_up += 1
                    raise PairTimeout(f"not done after {timeout_s:g} s") from None
            return made.result()

    def _run(
        self, made: Future[Made], call: Callable[[], Made], undo: Callable[[Made], None]
    ) -> None:
        try:
            result = call()
        except BaseException as error:
            with self._lock:
                if made.cancelled():
                    self._num_given_up -= 1
                else:
                    made.set_exception(error)
            return
        with self._lock:
            if is_late := made.cancelled():
                self._num_given_up -= 1
            else:
                made.set_result(result)
        if is_late:
            try:
                undo(result)
            except Exception:
                _log.exception("What was made too late could not be undone")
