"""Whether the wheels that requirements-cpu.txt pins can be installed here and would run.

Owns what they ask of a machine. Installs nothing. Standard library only, and Python 3.8 can run it,
so that a Python that is too old for pdserve is told so in words.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# What all the wheels have in common.
PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))
PROCESSORS = ("x86_64", "aarch64")
GLIBC = (2, 31)  # llguidance's; torch's, vLLM's and NIXL's are content with 2.28
# vLLM's CPU build has a variant for AVX-512 and one for AVX2, which dies of an illegal
# instruction on less.
X86_FLAGS = ("avx2", "f16c", "fma")
# Linked by vLLM's CPU build and in no wheel.
LIBRARIES = (("libnuma.so.1", "libnuma1"), ("libstdc++.so.6", "libstdc++6"))
VENV_GB = 5.0  # with a copy of the wheels in pip's cache
DOWNLOADS_GB = 1.0


@dataclass(frozen=True)  # Python 3.8 knows neither slots nor kw_only
class Disk:
    """A folder that is written to."""

    path: str
    free_gb: float
    needed_gb: float


@dataclass(frozen=True)
class Interpreter:
    """The Python that would make the virtual environment."""

    version: tuple[int, int]
    standard: bool
    """CPython with its global lock; not all the wheels are built for others."""
    has_venv: bool

    def fits(self) -> bool:
        return self.version in PYTHONS and self.standard and self.has_venv


@dataclass(frozen=True)
class Machine:
    """A machine as the wheels see it."""

    system: str
    processor: str
    glibc: tuple[int, int] | None
    """None with another C library."""
    x86_flags: frozenset[str] | None
    """None where the kernel does not say."""
    missing_libraries: tuple[str, ...]
    """The Debian packages that have them."""
    python: Interpreter
    disks: tuple[Disk, ...]


def why_not(machine: Machine) -> str | None:
    """Why the wheels cannot be installed or would not run, in one line; None if they do."""
    if machine.system != "Linux" or machine.processor not in PROCESSORS:
        here = f"{machine.system} on {machine.processor}"
        return f"needs Linux on {' or '.join(PROCESSORS)}; this is {here}"
    if machine.glibc is None:
        return f"needs glibc {dotted(GLIBC)} or newer; this system has another C library"
    if machine.glibc < GLIBC:
        return f"needs glibc {dotted(GLIBC)} or newer; this system has {dotted(machine.glibc)}"
    if machine.processor == "x86_64" and machine.x86_flags is not None:
        lacking = [flag for flag in X86_FLAGS if flag not in machine.x86_flags]
        if lacking:
            hidden = "a virtual machine may hide it unless it has the host's CPU model"
            return f"needs a processor with AVX2; this one lacks {', '.join(lacking)} ({hidden})"
    if not machine.python.fits():
        return why_not_python(machine.python)
    if machine.missing_libraries:
        packages = " ".join(machine.missing_libraries)
        return f"needs {packages} (so named in Debian and Ubuntu); install it first"
    for disk in machine.disks:
        if disk.free_gb < disk.needed_gb:
            return f"needs {disk.needed_gb:.1f} GB in {disk.path}; {disk.free_gb:.1f} GB are free"
    return None


def why_not_python(python: Interpreter) -> str:
    here = dotted(python.version)
    if python.version in PYTHONS and python.standard:
        return (
            f"needs Python's venv module: install python{here}-venv (so named in Debian and Ubuntu)"
        )
    wanted = f"Python {dotted(PYTHONS[0])} to {dotted(PYTHONS[-1])}"
    if python.version in PYTHONS:
        return f"needs {wanted} in its standard build; this is another: make setup PYTHON=path"
    return f"needs {wanted}, and none is on PATH; this is {here}: make setup PYTHON=path"


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def observe_machine(venv: Path) -> Machine:
    """This machine, with the Python that runs this."""
    missing_gb = max(0.0, VENV_GB - observe_size_gb(venv))
    return Machine(
        system=platform.system(),
        processor=platform.machine(),
        glibc=observe_glibc(),
        x86_flags=observe_x86_flags(Path("/proc/cpuinfo")),
        missing_libraries=tuple(package for file, package in LIBRARIES if not loads(file)),
        python=Interpreter(
            version=sys.version_info[:2],
            standard=platform.python_implementation() == "CPython"
            and "t" not in getattr(sys, "abiflags", ""),
            has_venv=find_spec("venv") is not None and find_spec("ensurepip") is not None,
        ),
        disks=(
            observe_disk(venv.parent, missing_gb),
            observe_disk(Path(tempfile.gettempdir()), min(missing_gb, DOWNLOADS_GB)),
        ),
    )


def observe_glibc() -> tuple[int, int] | None:
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # each on some other system
        return None
    match = re.match(r"glibc (\d+)\.(\d+)", name)
    return (int(match.group(1)), int(match.group(2))) if match else None


def observe_x86_flags(cpuinfo: Path) -> frozenset[str] | None:
    try:
        match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return frozenset(match.group(1).split()) if match else None


def observe_disk(folder: Path, needed_gb: float) -> Disk:
    return Disk(str(folder), shutil.disk_usage(folder).free / 1e9, needed_gb)


def observe_size_gb(folder: Path) -> float:
    files = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files) / 1e9


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def pick_python() -> str | None:
    """A Python on PATH that fits, the one that the tests run with first."""
    for version in PYTHONS:
        path = shutil.which(f"python{dotted(version)}")
        if path and answers(path, "import ensurepip, venv"):
            return path
    return None


def answers(python: str, code: str) -> bool:
    """Whether it is there and runs this without an error."""
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0
