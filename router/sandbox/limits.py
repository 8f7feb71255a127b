"""What a task may cost, and what becomes of one that costs more. Pure."""

import signal
from dataclasses import dataclass, replace

import msgspec

from router.errors import SandboxUnavailable, TaskRefused
from router.sandbox.wire import Answer, Ended, Job

PATIENCE = 20.0
"""Wall seconds for each CPU second: the machine is shared, and answers come first. Also for what
waits and does not compute."""

SIGNALS_OF_TIME = (signal.SIGPROF, signal.SIGXCPU)
SIGNALS_OF_OTHERS = (signal.SIGKILL, signal.SIGTERM)
"""No task ends itself with these: the kernel does where memory is short, or who runs the machine.
They say nothing of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLimits:
    """What one task may use."""

    cpu_s: float = 5.0
    memory_bytes: int = 512 * 1024 * 1024

    def within(self, cpu_s: float) -> "TaskLimits":
        return replace(self, cpu_s=min(cpu_s, self.cpu_s))

    def job(self, job_id: int, task: str, payload: bytes) -> Job:
        return Job(
            job_id=job_id,
            task=task,
            payload=payload,
            cpu_s=self.cpu_s,
            wall_s=self.cpu_s * PATIENCE,
            memory_bytes=self.memory_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A task, and the words for it in an error: "the JSON schema" takes long "to compile"."""

    task: str
    subject: str
    verb: str
    participle: str


def overran(ended: Ended) -> bool:
    """Whether more time could change the outcome."""
    return ended.was_killed or -ended.exit_code in SIGNALS_OF_TIME


def result_of(ended: Ended, work: Work, limits: TaskLimits) -> bytes:
    """What the child has found, as JSON.

    Raises:
        TaskRefused: it found nothing; in one line, why.
        SandboxUnavailable: it had no time to, or others ended it.
    """
    if ended.was_killed or -ended.exit_code in SIGNALS_OF_OTHERS:
        raise SandboxUnavailable
    if overran(ended):
        raise TaskRefused(f"{work.subject} takes longer than {limits.cpu_s:g} s to {work.verb}")
    if ended.exit_code:
        raise TaskRefused(
            f"{work.subject} cannot be {work.participle}: its process ended with {_how(ended)}"
        )
    try:
        answer = msgspec.json.decode(ended.output, type=Answer)
    except msgspec.DecodeError:
        raise TaskRefused(f"{work.subject} cannot be {work.participle}") from None
    if answer.is_out_of_memory:
        raise TaskRefused(
            f"{work.subject} takes more than {limits.memory_bytes // 2**20} MiB to {work.verb}"
        )
    if answer.refusal is not None:
        raise TaskRefused(answer.refusal, answer.parameter)
    return bytes(answer.result)


def _how(ended: Ended) -> str:
    try:
        return signal.Signals(-ended.exit_code).name
    except ValueError:
        return f"exit status {ended.exit_code}"
