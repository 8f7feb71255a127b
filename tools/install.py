"""Makes the virtual environment and installs what requirements-cpu.txt pins: `make setup`.

Owns the steps, and the two ways to torch's CPU build. Never decides what is installed. Standard
library only, and Python 3.8 can run it, so that one that is too old is told so in words.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tools.machine import PYTHONS, answers, dotted, observe_machine, pick_python, why_not
from tools.progress import Progress, Screen, reasons_in

ROOT = Path(__file__).resolve().parent.parent
UV = "uv==0.13.9"
POLL_S = 0.2
WHEELS_ONLY = ("--no-deps", "--only-binary", ":all:")


class Failed(Exception):
    """A step ended badly; says which and why."""


class Installation:
    """Owns one run of the steps: the log, the line on the screen, and the program that runs."""

    def __init__(self, root: Path, venv: Path) -> None:
        self._root = root
        self._venv = venv
        self._python = str(venv / "bin" / "python")
        self._log = root / "build" / "setup.log"
        self._requirements = root / "requirements-cpu.txt"
        self._pins = pins_in(self._requirements.read_text())
        self._progress = Progress(num_packages=len(self._pins))
        self._screen = Screen()

    def run(self) -> str:
        """Returns what was done. What is installed when this fails is not installed again."""
        self._log.parent.mkdir(exist_ok=True)
        self._log.write_text("")
        try:
            self._make_venv()
            self._forget_halves()
            self._install_torch()
            self._pip(*WHEELS_ONLY, "--requirement", str(self._requirements))
            self._pip("--no-deps", "--no-build-isolation", "--editable", str(self._root))
        finally:
            self._screen.clear()
        return f"Installed {len(self._pins)} packages in {self._screen.elapsed_s():.0f} s."

    def _make_venv(self) -> None:
        fits = f"import pip, sys; sys.exit(sys.version_info[:2] not in {PYTHONS})"
        if not answers(self._python, fits):
            command = [sys.executable, "-m", "venv", "--clear", str(self._venv)]
            self._must(command, doing="making the virtual environment")

    def _forget_halves(self) -> None:
        """pip takes for installed what it was stopped at; INSTALLER comes after the other files."""
        for package in self._venv.glob("lib/python*/site-packages/*.dist-info"):
            if not (package / "INSTALLER").exists():
                shutil.rmtree(package)

    def _install_torch(self) -> None:
        """By pip where it finds the build, else by uv, which knows where torch's builds are."""
        torch = next(pin for pin in self._pins if pin.startswith("torch=="))
        by_pip = [self._python, "-m", *pip_install(*WHEELS_ONLY, torch)]
        output = self._step(by_pip, doing=f"looking for {torch}")
        if output is None:
            return
        if not lacks(torch, output):
            raise Failed(self._report(by_pip, output))
        self._pip(*WHEELS_ONLY, UV)
        uv = [str(self._venv / "bin" / "uv"), "pip", "install", "--python", self._python]
        by_uv = [*uv, "--torch-backend", "cpu", *WHEELS_ONLY, torch]
        output = self._step(by_uv, doing=f"uv looks for {torch}")
        if output is not None:
            raise Failed(
                f"{self._report(by_uv, output)}\n"
                f"pip does not find {torch} either. Where you have its wheel or an index that has"
                " it, set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL and start again."
            )

    def _pip(self, *arguments: str) -> None:
        self._must([self._python, "-m", *pip_install(*arguments)], doing=f"pip: {arguments[-1]}")

    def _must(self, command: Sequence[str], doing: str) -> None:
        output = self._step(command, doing)
        if output is not None:
            raise Failed(self._report(command, output))

    def _report(self, command: Sequence[str], output: Iterable[str]) -> str:
        reasons = "".join(f"\n  {line}" for line in reasons_in(output))
        program = " ".join(Path(word).name for word in command[:4])
        return f"{program} ... failed:{reasons}\nIts whole output is in {self._log}."

    def _step(self, command: Sequence[str], doing: str) -> list[str] | None:
        """Runs it to its end; its output if it failed."""
        self._progress = replace(self._progress, num_found=0, doing=doing)
        lines: list[str] = []
        rest = ""
        with self._log.open("a") as log, self._log.open(errors="replace") as written:
            print("$", *command, file=log, flush=True)
            written.seek(0, os.SEEK_END)
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                ended = False
                while not ended:
                    ended = process.poll() is not None
                    *new, rest = (rest + written.read()).split("\n")
                    self._show(new)
                    lines += new
                    time.sleep(0 if ended else POLL_S)
            finally:
                end(process)
        return lines if process.returncode else None

    def _show(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._progress = self._progress.after(line)
        unpacked = self._venv.glob("lib/python*/site-packages/*.dist-info/INSTALLER")
        num_unpacked = sum(1 for _ in unpacked)
        self._screen.show(self._progress.text(num_unpacked, self._screen.elapsed_s()))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C reaches it as well, and pip removes what it downloaded before it ends."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def pip_install(*arguments: str) -> tuple[str, ...]:
    quiet = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")
    return ("pip", "install", *quiet, *arguments)


def pins_in(requirements: str) -> tuple[str, ...]:
    """NAME==VERSION of each line."""
    bare = (re.split("[#;]", line)[0].strip() for line in requirements.splitlines())
    return tuple(line for line in bare if line)


def lacks(pin: str, output: Iterable[str]) -> bool:
    """Whether pip says that no place it looks in has this version.

    Where a constraint names the package, pip calls it a conflict, and so it does where that
    constraint is to blame; the next step, which wants the same pin, then fails of it.
    """
    found_none = (f"No matching distribution found for {pin}", f"Cannot install {pin} because")
    return any(words in line for line in output for words in found_none)


def change_python(arguments: Sequence[str]) -> None:
    """Starts again with a Python that fits, if there is another."""
    python = pick_python()
    if python and os.path.realpath(python) != os.path.realpath(sys.executable):
        print(f"Python {dotted(sys.version_info[:2])} does not fit; taking {python}", flush=True)
        os.execv(python, [python, "-m", "tools.install", *arguments])


def main(arguments: Sequence[str]) -> int:
    """The exit status: 2 if this machine is refused, 1 if a step failed."""
    venv = ROOT / arguments[0]
    machine = observe_machine(venv)
    if not machine.python.fits():
        change_python(arguments)
    refusal = why_not(machine)
    if refusal is not None:
        print(f"pdserve {refusal}", file=sys.stderr)
        return 2
    print(f"Installing into {venv.name}: about 4 GB, a few minutes.", flush=True)
    try:
        print(Installation(ROOT, venv).run())
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot install into {venv}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. make setup goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
