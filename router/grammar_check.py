"""Whether an engine may be given a request's constraint: a grammar, schema, regular expression, ...

An engine compiles it, and what ends the compiler ends the engine. So a process of the sandbox does
it first, just as the engine will, and with limits.
"""

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from router.clients import CLIENT
from router.errors import TaskRefused
from router.sandbox.limits import Work

MAX_VERDICTS = 10_000
MAX_TEXT_LENGTH = 64 * 1024 * 1024
"""Of all texts that verdicts hold."""

WORK = {
    field: Work(task="compile", subject=subject, verb="compile", participle="compiled")
    for field, subject in {
        "json": "the JSON schema",
        "regex": "the regular expression",
        "choice": "the list of choices",
        "grammar": "the grammar",
        "json_object": "the JSON schema",
        "structural_tag": "the structural tag",
    }.items()
}
"""By the field of vLLM's parameters, of which a request has one."""

OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


class Runs(Protocol):
    """What a check asks of the sandbox."""

    async def run(self, work: Work, payload: bytes) -> bytes: ...


class Passed(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM's validation has found, to be put into the request."""

    backend: str
    was_auto: bool
    grammar: str | None = None
    """What has become of a list of choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failed:
    message: str
    parameter: str | None


@dataclass(slots=True)
class _Check:
    """One client's, of one constraint. Its answer may come from another client's."""

    task: "asyncio.Task[Passed | _Failed]"
    answer: "asyncio.Future[Passed | _Failed]"
    num_waiting: int = 0


class GrammarCheck:
    """Owns the verdicts, by the hash of what they are about, the longest unused first to go."""

    def __init__(self, sandbox: Runs) -> None:
        self._sandbox = sandbox
        self._verdicts: OrderedDict[bytes, Passed | _Failed] = OrderedDict()
        self._text_length = 0
        self._checking: dict[tuple[str, bytes], _Check] = {}
        """By client too: nobody waits in another's line."""

    async def apply(self, constraint: StructuredOutputsParams) -> None:
        """Leaves the constraint as vLLM's own validation does.

        Raises:
            VLLMValidationError: no engine may be given it.
            SandboxUnavailable: it cannot be checked now.
        """
        field, payload = _asked(constraint)
        key = _key(payload)
        if (verdict := self._verdicts.get(key)) is not None:
            self._verdicts.move_to_end(key)
        else:
            verdict = await self._shared(key, WORK[field], payload)
        if isinstance(verdict, _Failed):
            raise VLLMValidationError(verdict.message, parameter=verdict.parameter)
        constraint._backend = verdict.backend
        constraint._backend_was_auto = verdict.was_auto
        if verdict.grammar is not None:
            constraint.choice, constraint.grammar = None, verdict.grammar
            # A request with several prompts comes again, so changed, with each of them.
            _, payload = _asked(constraint)
            self._keep(_key(payload), msgspec.structs.replace(verdict, grammar=None))

    async def _shared(self, key: bytes, work: Work, payload: str) -> Passed | _Failed:
        """One check for all of a client's that are the same, for as long as one of them waits; the
        first that has ended answers for all clients."""
        own = (CLIENT.get(), key)
        if (check := self._checking.get(own)) is None:
            check = self._begin(own, work, payload)
        check.num_waiting += 1
        try:
            return await asyncio.shield(check.answer)
        finally:
            check.num_waiting -= 1
            if not check.num_waiting:
                check.task.cancel()
                check.answer.cancel()
                if self._checking.get(own) is check:
                    del self._checking[own]

    def _begin(self, own: tuple[str, bytes], work: Work, payload: str) -> _Check:
        answer = asyncio.get_running_loop().create_future()
        check = _Check(asyncio.create_task(self._check(work, payload)), answer)
        self._checking[own] = check

        def ended(task: "asyncio.Task[Passed | _Failed]") -> None:
            if task.cancelled():
                return
            if (error := task.exception()) is not None:
                # Of this client's turn, say: others' checks go on.
                if not answer.done():
                    answer.set_exception(error)
                return
            for (_, key), each in self._checking.items():
                if key == own[1] and not each.answer.done():
                    each.answer.set_result(task.result())

        check.task.add_done_callback(ended)
        return check

    async def _check(self, work: Work, payload: str) -> Passed | _Failed:
        verdict: Passed | _Failed
        try:
            found = await self._sandbox.run(work, payload.encode())
            verdict = msgspec.json.decode(found, type=Passed)
        except TaskRefused as refused:
            verdict = _Failed(message=refused.message, parameter=refused.parameter)
        self._keep(_key(payload), verdict)
        return verdict

    def _keep(self, key: bytes, verdict: Passed | _Failed) -> None:
        if key in self._verdicts:
            return
        self._verdicts[key] = verdict
        self._text_length += _text_length(verdict)
        while len(self._verdicts) > MAX_VERDICTS or self._text_length > MAX_TEXT_LENGTH:
            _, oldest = self._verdicts.popitem(last=False)
            self._text_length -= _text_length(oldest)


def _text_length(verdict: Passed | _Failed) -> int:
    return len(verdict.message if isinstance(verdict, _Failed) else verdict.grammar or "")


def _key(payload: str) -> bytes:
    return hashlib.sha256(payload.encode()).digest()


def _asked(constraint: StructuredOutputsParams) -> tuple[str, str]:
    """The field that constrains, and all that counts, as JSON."""
    given: Mapping[str, Any] = vars(constraint)
    field = next(field for field in WORK if given[field] is not None)
    fields = {field: given[field]} | {name: given[name] for name in OPTIONS if given[name]}
    try:
        return field, json.dumps(fields)
    except RecursionError:
        raise VLLMValidationError("The JSON schema is nested too deeply") from None
