"""A zygote whose tasks are odd ones: it loads nothing, so that it starts at once."""

import ctypes
import os
import sys
import time
from typing import Any

from router.sandbox.child import Task
from router.sandbox.zygote import serve


def echo(payload: Any) -> Any:
    return payload


def crash(_: Any) -> Any:
    return ctypes.string_at(0)


def spin(_: Any) -> Any:
    while True:
        pass


def sleep(_: Any) -> Any:
    time.sleep(3600)


def allocate(num_bytes: int) -> int:
    return len(bytearray(num_bytes))


def leave(status: int) -> Any:
    os._exit(status)


def pid(_: Any) -> list[int]:
    return [os.getpid(), os.getppid()]


TASKS: dict[str, Task] = {
    task.__name__: task for task in (echo, crash, spin, sleep, allocate, leave, pid)
}

if __name__ == "__main__":
    serve(int(sys.argv[1]), TASKS)
