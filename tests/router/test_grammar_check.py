"""What clients constrain their answers with, compiled in the sandbox for the demo model."""

import asyncio
import json
import signal
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from router import grammar_check
from router.clients import CLIENT
from router.errors import SandboxUnavailable
from router.grammar_check import GrammarCheck
from router.sandbox.limits import TaskLimits, Work, result_of
from router.sandbox.process import SandboxProcess
from router.sandbox.queue import Sandbox
from router.sandbox.wire import Ended

pytestmark = pytest.mark.asyncio(loop_scope="session")

OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.fixture
def check(zygote: SandboxProcess) -> GrammarCheck:
    return GrammarCheck(Sandbox(zygote, TaskLimits(cpu_s=0.5, memory_bytes=128 * 2**20)))


def constraint(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def pattern(text: str) -> dict[str, Any]:
    return {"json": {"type": "string", "pattern": text}}


def tag(schema: Any) -> dict[str, Any]:
    content = {"type": "json_schema", "json_schema": schema}
    return {"structural_tag": json.dumps({"type": "structural_tag", "format": content})}


def long_chain(num: int) -> dict[str, Any]:
    rules = [f'r{index} ::= "a" r{index + 1} | "b" r{index + 1}' for index in range(num)]
    return {"grammar": "\n".join(["root ::= r0", *rules, f'r{num} ::= "z"'])}


@pytest.mark.parametrize(
    ("fields", "backend"),
    [
        pytest.param({"json": OBJECT}, "xgrammar", id="schema"),
        pytest.param({"json": json.dumps(OBJECT)}, "xgrammar", id="schema-as-text"),
        pytest.param({"json_object": True}, "xgrammar", id="any-object"),
        pytest.param(pattern("(ab?){2,5}"), "xgrammar", id="pattern"),
        pytest.param({"json": {"enum": [f"v{i}" for i in range(1000)]}}, "xgrammar", id="enum"),
        pytest.param({"regex": "(a+)+b"}, "xgrammar", id="regex"),
        pytest.param({"grammar": 'root ::= "a" | "b"'}, "xgrammar", id="ebnf"),
        pytest.param({"grammar": 'root ::= root "a" | "b"'}, "xgrammar", id="left-recursion"),
        pytest.param({"grammar": 'start: "a" | "b"'}, "xgrammar", id="lark"),
        pytest.param(tag(OBJECT), "xgrammar", id="structural-tag"),
        pytest.param(
            {"json": {"type": "integer", "multipleOf": 5}}, "guidance", id="other-backend"
        ),
        pytest.param(
            {"json": {**OBJECT, "patternProperties": {"^b": {"type": "string"}}}},
            "outlines",
            id="third-backend",
        ),
    ],
)
async def test_what_an_engine_can_take_passes(
    check: GrammarCheck, fields: dict[str, Any], backend: str
) -> None:
    structured = constraint(**fields)
    await check.apply(structured)
    assert (structured._backend, structured._backend_was_auto) == (backend, True)
    (field,) = fields
    assert getattr(structured, field) == fields[field]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(pattern("(" * 32_000 + "a" + ")" * 32_000), "ended with SIGSEGV", id="deep"),
        pytest.param(tag(pattern("(" * 32_000 + "a" + ")" * 32_000)["json"]), "SIGSEGV", id="tag"),
        pytest.param(pattern("(" * 9_000 + "a" + "|b)" * 9_000), "SIGSEGV", id="alternatives"),
        pytest.param(
            {"json": {"enum": [f"v{i}" for i in range(30_000)]}},
            "the JSON schema takes longer than 0.5 s to compile",
            id="enum",
        ),
        pytest.param(long_chain(20_000), "the grammar takes longer than 0.5 s", id="many-rules"),
        pytest.param({"choice": [f"a{i}" for i in range(300_000)]}, "the list of", id="choices"),
        pytest.param({"grammar": 'root ::= s\ns ::= s s s s | s s | [a-z]* | ""'}, "", id="ways"),
        pytest.param({"json": {"$ref": "#"}}, "no answer at all", id="itself"),
        pytest.param({"grammar": "root ::= a\na ::= b\nb ::= a"}, "", id="in-a-circle"),
        pytest.param({"grammar": "root ::= ((("}, "Invalid grammar", id="syntax"),
        pytest.param({"regex": "(("}, "", id="regex-syntax"),
        pytest.param({"regex": "a\0"}, "NUL", id="nul"),
        pytest.param({"regex": "\ud800"}, "", id="surrogate"),
        pytest.param({"choice": []}, "cannot be an empty list", id="no-choice"),
        pytest.param({"json_object": False}, "must be True", id="no-object"),
        pytest.param({"json": "{"}, "Invalid JSON", id="no-json"),
        pytest.param({"structural_tag": "{}"}, "Invalid", id="no-tag"),
    ],
)
async def test_what_it_cannot_take_is_refused(
    check: GrammarCheck, zygote: SandboxProcess, fields: dict[str, Any], message: str
) -> None:
    pid = zygote.pid
    with pytest.raises(VLLMValidationError) as caught:
        await check.apply(constraint(**fields))
    assert message in str(caught.value)
    assert 0 < len(str(caught.value)) < 10_000
    assert zygote.pid == pid


async def test_a_schema_that_nests_too_deeply_is_refused(check: GrammarCheck) -> None:
    schema: dict[str, Any] = {}
    for _ in range(5_000):
        schema = {"items": schema}
    with pytest.raises(VLLMValidationError, match="nested too deeply"):
        await check.apply(constraint(json=schema))


async def test_choices_become_a_grammar_as_in_vllm(check: GrammarCheck) -> None:
    structured = constraint(choice=["yes", 'n"o'])
    await check.apply(structured)
    assert structured.choice is None
    assert structured.grammar == 'root ::= "yes" | "n\\"o"'
    structured.__post_init__()


class Counting:
    """The sandbox, with a count of what it is asked."""

    def __init__(self, zygote: SandboxProcess) -> None:
        self.num_asked = 0
        self.may_go = asyncio.Event()
        self.may_go.set()
        self._sandbox = Sandbox(zygote, TaskLimits())

    async def run(self, work: Work, payload: bytes) -> bytes:
        self.num_asked += 1
        await self.may_go.wait()
        return await self._sandbox.run(work, payload)


@pytest.fixture
def counting(zygote: SandboxProcess) -> Counting:
    return Counting(zygote)


async def test_what_is_known_is_not_asked_again(counting: Counting) -> None:
    check = GrammarCheck(counting)
    for _ in range(3):
        await check.apply(constraint(json=OBJECT))
        with pytest.raises(VLLMValidationError):
            await check.apply(constraint(regex="(("))
    assert counting.num_asked == 2
    await check.apply(constraint(json=OBJECT, disable_any_whitespace=True))
    assert counting.num_asked == 3


class KillsOnce:
    """A sandbox whose first child the kernel takes, for its memory."""

    def __init__(self) -> None:
        passed = b'{"result": {"backend": "xgrammar", "was_auto": true}}'
        self._ends = [
            Ended(job_id=0, exit_code=-signal.SIGKILL, output=b""),
            Ended(job_id=1, exit_code=0, output=passed),
        ]

    async def run(self, work: Work, payload: bytes) -> bytes:
        return result_of(self._ends.pop(0), work, TaskLimits())


async def test_that_a_child_was_killed_is_not_kept() -> None:
    check = GrammarCheck(KillsOnce())
    with pytest.raises(SandboxUnavailable):
        await check.apply(constraint(json=OBJECT))
    await check.apply(constraint(json=OBJECT))


async def test_the_next_prompt_of_a_request_is_not_asked_for_again(counting: Counting) -> None:
    check, structured = GrammarCheck(counting), constraint(choice=["a", "b"])
    for _ in range(3):
        await check.apply(structured)
    assert counting.num_asked == 1


async def test_many_who_ask_the_same_ask_once_also_if_the_first_goes(counting: Counting) -> None:
    check = GrammarCheck(counting)
    counting.may_go.clear()
    first, *others = (asyncio.create_task(check.apply(constraint(json=OBJECT))) for _ in range(5))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    counting.may_go.set()
    await asyncio.gather(*others)
    assert counting.num_asked == 1
    assert not check._checking


class Slowly:
    """A sandbox with a turn for each client; "a"'s comes first."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def run(self, work: Work, payload: bytes) -> bytes:
        if CLIENT.get() == "a":
            await self.may_end.wait()
            return b'{"backend": "xgrammar", "was_auto": true}'
        await asyncio.Event().wait()
        raise AssertionError("its turn never comes")


async def test_the_first_answer_is_everybodys() -> None:
    slowly = Slowly()
    check = GrammarCheck(slowly)
    asking = []
    for client in "abcd":
        CLIENT.set(client)
        asking.append(asyncio.create_task(check.apply(constraint(json=OBJECT))))
    await asyncio.sleep(0)
    slowly.may_end.set()
    await asyncio.wait_for(asyncio.gather(*asking), 10)
    assert not check._checking


async def test_nobody_waits_in_anothers_line(counting: Counting) -> None:
    check = GrammarCheck(counting)
    counting.may_go.clear()
    asking = []
    for client in ("a", "b", "a"):
        CLIENT.set(client)
        asking.append(asyncio.create_task(check.apply(constraint(json=OBJECT))))
    await asyncio.sleep(0)
    assert len(check._checking) == 2
    counting.may_go.set()
    await asyncio.gather(*asking)
    assert counting.num_asked == 2


async def test_what_nobody_waits_for_any_more_is_not_checked(counting: Counting) -> None:
    check = GrammarCheck(counting)
    counting.may_go.clear()
    waiting = [asyncio.create_task(check.apply(constraint(regex="a"))) for _ in range(2)]
    await asyncio.sleep(0)
    (checking,) = check._checking.values()
    for task in waiting:
        task.cancel()
    await asyncio.wait([*waiting, checking.task])
    assert checking.task.cancelled()
    assert not check._checking
    counting.may_go.set()
    await check.apply(constraint(regex="a"))


async def test_verdicts_are_bounded_in_number_and_length(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "MAX_VERDICTS", 2)
    check = GrammarCheck(counting)
    for letter in "abac":
        await check.apply(constraint(regex=letter))
    assert counting.num_asked == 3
    await check.apply(constraint(regex="a"))
    assert counting.num_asked == 3, "the one that was used last is kept"
    await check.apply(constraint(regex="b"))
    assert counting.num_asked == 4
    monkeypatch.setattr(grammar_check, "MAX_TEXT_LENGTH", 100)
    for number in range(5):
        await check.apply(constraint(choice=[f"{number}" * 60]))
    assert check._text_length <= 100
    assert len(check._verdicts) <= 2
