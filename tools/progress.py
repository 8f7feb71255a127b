"""What the user sees while pip and uv work, told from what they print.

Owns the one line of progress and the choice of lines that say why they failed. Runs nothing.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

PLAIN_LINE_EVERY_S = 20.0

FOUND = re.compile(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)")
UNPACKING = re.compile(r"Installing collected packages: (.*)")
DOWNLOADING = re.compile(r"\s*Downloading (?:\S*/)?(\S+?)(?:-\d\S*)? \(([\d.]+) ?([kM])i?B\)")
TELLING = re.compile("\\s*(ERROR|error|Error|cause|WARNING: Retrying|[\N{MULTIPLICATION SIGN}╰])")


@dataclass(frozen=True)  # Python 3.8 knows neither slots nor kw_only
class Progress:
    """What the output has said so far."""

    num_packages: int
    num_found: int = 0
    downloaded_mb: float = 0.0
    doing: str = ""

    def after(self, line: str) -> Progress:
        """With one more line of output."""
        if match := FOUND.match(line):
            return replace(self, num_found=self.num_found + 1, doing=f"finding {match.group(1)}")
        if match := DOWNLOADING.match(line):
            mb = float(match.group(2)) / (1000 if match.group(3) == "k" else 1)
            doing = f"downloading {match.group(1)} ({mb:.0f} MB)" if mb >= 1 else self.doing
            return replace(self, downloaded_mb=self.downloaded_mb + mb, doing=doing)
        if match := UNPACKING.match(line):
            names = match.group(1)
            return replace(self, doing="unpacking" if ", " in names else f"unpacking {names}")
        return self

    def text(self, num_unpacked: int, elapsed_s: float) -> str:
        """One line: seconds, packages, MB, and what is being done."""
        num = min(num_unpacked, self.num_packages)  # pip itself is there as well
        if self.doing != "unpacking":
            num = self.num_found
        facts = [f"{elapsed_s:.0f} s"]
        if num:
            facts.append(f"{num} of {self.num_packages} packages")
        if self.downloaded_mb >= 1:
            facts.append(f"{self.downloaded_mb:.0f} MB")
        return f"{', '.join(facts)}: {self.doing}"


def reasons_in(output: Iterable[str]) -> tuple[str, ...]:
    """The last lines that say what went wrong; those about places that pip ignores never do."""
    said = [line for line in output if line.strip() and "is ignored: it is neither" not in line]
    return tuple(([line for line in said if TELLING.match(line)] or said)[-8:])


class Screen:
    """Owns the line: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._printed_s = self._started_s
        self._rewrites = sys.stdout.isatty()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def show(self, text: str) -> None:
        if self._rewrites:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)
        elif time.monotonic() - self._printed_s >= PLAIN_LINE_EVERY_S:
            self._printed_s = time.monotonic()
            print(text, flush=True)

    def clear(self) -> None:
        """Before anything else is printed."""
        if self._rewrites:
            print("\r\x1b[K", end="", flush=True)
