"""Why an engine ended, in one line: by which signal or exit status, and what it said last.

Owns the words. An engine's processes write where their replica writes, so that the end of the
replica's own output is also the end of theirs.
"""

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass

TAIL_BYTES = 64 * 1024
MAX_TEXT = 500

_FATAL_SIGNALS: Mapping[str, str] = {
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
    "Segmentation fault": "SIGSEGV",
}
"""What faulthandler calls them."""

_LIKELY: Mapping[str, str] = {
    "SIGILL": "this processor has not, or may not use, an instruction of vLLM's kernels",
    "SIGKILL": "somebody killed it, or the system did because memory ran out",
    "SIGBUS": "a file that it had mapped has shrunk, often because /dev/shm is full",
}

_OF_ENGINE = re.compile(r"^\((?:EngineCore|Worker)\S* pid=\d+\) ?")
_LOG_HEAD = re.compile(r"^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[\S+\] ?")
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)\b")
_FATAL = re.compile(r"^Fatal Python error: (.*)")
_CRASHED_AT = re.compile(r"^Current thread .*first\)")
_FRAME = re.compile(r'^ *File "(.+)", line (\d+) in (.+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineExit:
    """How an engine ended."""

    cause: str
    """For metrics: a signal's name, or `error` for anything else that ends a program."""
    text: str
    """For people, one line."""
    num_requests: int = 0
    """That it had when it ended, of all routers."""


def explain_exit(exit_code: int | None, output: str) -> EngineExit:
    """How an engine ended, from what is known of it.

    Args:
        exit_code: As of Python's `multiprocessing`: negative for a signal. None where the process
            has said that it is about to end, and has not ended yet.
        output: The end of what the engine and its replica have written.
    """
    said = last_words(output)
    if exit_code is not None and exit_code < 0 and _crash(said) is None:
        said = ""  # whatever it was, it was before, and did not end the engine
    name = _signal(exit_code, said)
    if name is not None:
        text = f"the engine was ended by {name}"
    elif exit_code is None:
        text = "the engine ended with an error"
    else:
        text = f"the engine ended with exit status {exit_code}"
    if likely := _LIKELY.get(name or ""):
        text += f" ({likely})"
    if said:
        text += f"; it said last: {said}"
    return EngineExit(cause=name or "error", text=text[:MAX_TEXT])


def _signal(exit_code: int | None, said: str) -> str | None:
    """The signal that ended the engine, or one of its ranks, which then ended the engine."""
    if exit_code is None or exit_code >= 0:
        return _crash(said)
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal_{-exit_code}"


def _crash(said: str) -> str | None:
    return _FATAL_SIGNALS.get(said.partition(",")[0])


def last_words(output: str) -> str:
    """The line of an engine's output that says most: its last error, or where it crashed."""
    lines = output.splitlines()
    for index in range(len(lines) - 1, -1, -1):
        if fatal := _FATAL.match(lines[index]):
            return f"{fatal[1]}{_place(lines[index:])}"
        text, is_engines = _OF_ENGINE.subn("", lines[index])
        text = _LOG_HEAD.sub("", text).strip()
        if is_engines and _RAISED.match(text):
            return text
    return ""


def _place(lines: list[str]) -> str:
    """Where faulthandler saw the thread that crashed: its innermost frame."""
    for index, line in enumerate(lines):
        if _CRASHED_AT.match(line):
            frame = _FRAME.match(lines[index + 1]) if index + 1 < len(lines) else None
            return f", in {frame[3]} ({frame[1]}, line {frame[2]})" if frame else ""
    return ""


def read_own_output() -> str:
    """The end of what this process and its children have written, where that goes to files."""
    return "\n".join(_read_tail(number) for number in (1, 2))


def _read_tail(file_number: int) -> str:
    try:
        # Opened anew: reading must not move where the others write.
        with open(f"/proc/self/fd/{file_number}", "rb") as file:
            if not file.seekable():
                return ""
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read(TAIL_BYTES).decode(errors="replace")
    except OSError:  # a terminal or a pipe, which cannot be read
        return ""
