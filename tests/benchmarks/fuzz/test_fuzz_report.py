"""What is written of a run."""

import base64
import json
from pathlib import Path

from benchmarks.chaos_answers import Answer
from benchmarks.chaos_client import Outcome
from benchmarks.fuzz.client import End, Reply
from benchmarks.fuzz.good import CASES, Alone
from benchmarks.fuzz.mix import Mix
from benchmarks.fuzz.report import grouped, report, write_findings
from benchmarks.fuzz.schema import Api
from benchmarks.fuzz.shots import Kind, Shot
from benchmarks.fuzz.verdict import Asked, Fired, Held, Record, judge
from benchmarks.machine import Machine

MACHINE = Machine(
    cpu="a CPU", num_cores=2, memory_gib=8, system="Linux", versions=(), real_time_client=False
)
MIX = Mix(Api({"paths": {"/health": {"get": {}}}}), CASES, seed=0, kinds=(Kind.PORT, Kind.HEADERS))
NUMBERS = [number for number in range(40) if isinstance(MIX.slot(number).what, Shot)]
GOOD = next(number for number in range(40) if number not in NUMBERS)


def fired(number: int, status: int) -> Fired:
    shot = MIX.slot(number).what
    assert isinstance(shot, Shot)
    reply = Reply(
        end=End.ANSWERED, start_s=0, end_s=1, statuses=(status,), beginning=f"HTTP/1.1 {status}"
    )
    return Fired(number=number, shot=shot, target="a port", reply=reply)


def asked(number: int) -> Asked:
    outcome = Outcome(
        case=CASES[0].name, start_s=0, end_s=9, answer=None, arrivals_s=(), error="no"
    )
    return Asked(number=number, outcome=outcome)


RECORD = Record(
    seed=0,
    alone={CASES[0].name: Alone(answer=Answer(choices=(), completion_tokens=1), took_s=(0.1,))},
    fired=(fired(NUMBERS[0], 500), fired(NUMBERS[1], 200)),
    asked=(asked(GOOD), asked(GOOD)),
    ended=(),
    held=(Held(lines=("inflight: 1",), suspects=(NUMBERS[1],)),),
    num_audits=1,
)


def test_findings_of_a_sort_are_one() -> None:
    counts = [count for _, count in grouped(judge(RECORD))]
    assert counts == [1, 2, 1]


def test_the_report_names_what_was_found() -> None:
    text = report(RECORD, judge(RECORD), machine=MACHINE, minutes=2)
    assert "**It did not hold.**" in text
    assert "inflight: 1" in text
    for kind in Kind:
        assert f"| {kind.value} |" in text


def test_a_finding_is_written_whole(tmp_path: Path) -> None:
    (tmp_path / "999-old.json").write_text("{}")
    write_findings(tmp_path, RECORD, judge(RECORD), MIX)
    first, *rest = sorted(tmp_path.glob("*.json"))
    found = json.loads(first.read_text())
    (request,) = found["requests"]
    sent = b"".join(base64.b64decode(part["base64"]) for part in request["parts"])
    shot = MIX.slot(NUMBERS[0]).what
    assert isinstance(shot, Shot)
    assert sent == b"".join(part.data for part in shot.parts)
    assert (request["answer"], found["seed"]) == ("HTTP/1.1 500", 0)
    assert [path.name for path in rest] == ["001-wrong.json", "002-held.json"]
