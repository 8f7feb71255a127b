"""A child of the zygote: one task, within its limits, in a process that ends with it."""

import ctypes
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from router.sandbox.wire import MAX_OUTPUT_BYTES, Job

Task = Callable[[Any], Any]
"""From a payload to a result, both as JSON has them. An exception is a refusal."""

MAX_REFUSAL_LENGTH = 4_000
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


def run_child(job: Job, tasks: Mapping[str, Task], output: int) -> None:
    """To be called right after the fork. Ends the process."""
    try:
        limit(job)
        _write_all(output, answer(tasks[job.task], job.payload))
    finally:
        os._exit(0)


def limit(job: Job) -> None:
    """Sets the limits of this process. The kernel keeps them, whatever the task does."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory_bytes = _data_bytes() + job.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    # Counts the CPU time of all threads. Its signal ends the process.
    signal.setitimer(signal.ITIMER_PROF, job.cpu_s)


def answer(task: Task, payload: bytes) -> bytes:
    """The task's word, as JSON."""
    try:
        text = json.dumps({"result": task(json.loads(payload))}).encode()
        if len(text) > MAX_OUTPUT_BYTES:
            raise ValueError(f"the result is larger than {MAX_OUTPUT_BYTES} bytes")
    except BaseException as error:  # a Rust panic is no Exception
        text = json.dumps(refusal(error)).encode()
    return text


def refusal(error: BaseException) -> dict[str, Any]:
    if any(isinstance(each, MemoryError) or "bad_alloc" in str(each) for each in _chain(error)):
        return {"refusal": "", "is_out_of_memory": True}
    # What vLLM adds to the text of its errors, it adds again in the router.
    told = (str(error.args[0]) if error.args else "") or type(error).__name__
    return {
        "refusal": told[:MAX_REFUSAL_LENGTH].encode("utf-8", "replace").decode(),
        "parameter": getattr(error, "parameter", None),
    }


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of. vLLM makes its own errors of others."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def _write_all(fd: int, text: bytes) -> None:
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]
