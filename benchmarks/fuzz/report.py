"""What a fuzz run's report looks like, and the file of a finding. Never judges."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.chaos_cases import Case
from benchmarks.fuzz.good import TIMES_SLOWER, limits_s
from benchmarks.fuzz.mix import ROUND, Mix
from benchmarks.fuzz.shots import Kind, Shot
from benchmarks.fuzz.verdict import Finding, Fired, Record, Symptom, Verdict
from benchmarks.machine import Machine

_MAX_LINES = 40
_MAX_SHOWN = 3


def report(record: Record, verdict: Verdict, *, machine: Machine, minutes: float) -> str:
    """The whole report; Markdown."""
    held = "**It held.**" if verdict.holds else "**It did not hold.**"
    sections = [
        "# Fuzz\n\nWritten by `python -m benchmarks.fuzz`; do not edit.",
        held,
        summary_table(record, verdict),
        _findings(verdict),
        f"## By kind of request\n\n{_kind_table(record)}",
        f"## Good requests\n\n{_good_table(record)}",
        f"## How it was measured\n\n{_method(record, minutes)}",
        f"## Machine\n\n{machine.markdown()}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def summary_table(record: Record, verdict: Verdict) -> str:
    """The numbers of the run."""
    rows = [
        ("", "value"),
        ("requests", f"{verdict.num_requests}"),
        ("of them, good ones", f"{len(record.asked)}"),
        *((symptom.value, f"{verdict.count(symptom)}") for symptom in Symptom),
        ("slowest good request", f"{verdict.slowest_good_s:.2f} s"),
        ("looks at what is held", f"{record.num_audits}"),
        ("seed", f"{record.seed}"),
    ]
    return _table(rows)


def grouped(verdict: Verdict) -> list[tuple[Finding, int]]:
    """The first finding of each sort, and how many there are of it."""
    counts: Counter[tuple[Symptom, str]] = Counter()
    firsts: dict[tuple[Symptom, str], Finding] = {}
    for finding in verdict.findings:
        sort = (finding.symptom, _sort(finding))
        counts[sort] += 1
        firsts.setdefault(sort, finding)
    return [(finding, counts[sort]) for sort, finding in firsts.items()]


def write_findings(folder: Path, record: Record, verdict: Verdict, mix: Mix) -> None:
    """A file for each sort of finding, with its requests whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    fired = {each.number: each for each in record.fired}
    for number, (finding, _) in enumerate(grouped(verdict)):
        path = folder / f"{number:03d}-{finding.symptom.name.lower()}.json"
        path.write_text(json.dumps(_finding_json(finding, verdict.seed, fired, mix), indent=1))


def shown(finding: Finding, mix: Mix) -> str:
    """Its requests, shortened for the screen."""
    return "\n".join(
        f"    {number}: {_shown(mix, number)}" for number in finding.numbers[:_MAX_SHOWN]
    )


def _sort(finding: Finding) -> str:
    """What findings of a symptom have in common that are shown once: good requests, their case."""
    of_good = finding.symptom in (Symptom.WRONG, Symptom.SLOW)
    return finding.what.partition(":")[0] if of_good else finding.what


def _shown(mix: Mix, number: int) -> str:
    what = mix.slot(number).what
    return f"the good request {what.name}" if isinstance(what, Case) else what.shown()


def _finding_json(
    finding: Finding, seed: int, fired: Mapping[int, Fired], mix: Mix
) -> dict[str, object]:
    return {
        "symptom": finding.symptom.value,
        "what": finding.what,
        "seed": seed,
        "numbers": finding.numbers,
        "requests": [
            {"number": number, **_request_json(mix.slot(number).what, fired.get(number))}
            for number in finding.numbers
        ],
    }


def _request_json(what: Case | Shot, fired: Fired | None) -> Mapping[str, object]:
    if isinstance(what, Case):
        return {"good": what.name}
    if fired is None:  # It was under way when the run ended.
        return what.as_json()
    met = {"target": fired.target, "end": fired.reply.end.value, "answer": fired.reply.beginning}
    return {**what.as_json(), **met}


def _findings(verdict: Verdict) -> str:
    if verdict.holds:
        return ""
    lines = [
        f"- {finding.symptom.value}: {finding.what}"
        + (f" ({count} times)" if count > 1 else "")
        + (f", number {finding.numbers[0]}" if len(finding.numbers) == 1 else "")
        for finding, count in grouped(verdict)
    ]
    more = [f"- … and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return "## Findings\n\n" + "\n".join((*lines[:_MAX_LINES], *more))


def _kind_table(record: Record) -> str:
    rows: list[tuple[str, ...]] = [("kind", "sent", "statuses", "without one")]
    for kind in Kind:
        fired = [each for each in record.fired if each.shot.kind is kind]
        statuses = Counter(status for each in fired for status in each.reply.statuses)
        without = Counter(each.reply.end.value for each in fired if not each.reply.statuses)
        rows.append((kind.value, f"{len(fired)}", _counts(statuses), _counts(without)))
    return _table(rows)


def _good_table(record: Record) -> str:
    rows: list[tuple[str, ...]] = [
        ("case", "asked", "median alone", "median", "slowest", "limit"),
    ]
    limits = limits_s(record.alone)
    for name, alone in record.alone.items():
        took_s = [
            each.outcome.end_s - each.outcome.start_s
            for each in record.asked
            if each.outcome.case == name
        ]
        rows.append(
            (
                name,
                f"{len(took_s)}",
                _seconds(median(alone.took_s)),
                _seconds(median(took_s)) if took_s else "-",
                _seconds(max(took_s)) if took_s else "-",
                _seconds(limits[name]),
            )
        )
    return _table(rows)


def _method(record: Record, minutes: float) -> str:
    return (
        f"A live cluster of two and two engines and two routers on this machine got requests for"
        f" {minutes:g} minutes: made from the API's own OpenAPI schema and changed, in broken HTTP,"
        f" from clients that leave or never finish, and bytes at every other port of its own"
        f" processes; a quarter were good requests, whose answers were compared with those they had"
        f" alone. Such a request may take {TIMES_SLOWER} times its median alone, or"
        f" {TIMES_SLOWER} times the median of all cases' medians, or what the cluster's targets for"
        f" TTFT and ITL allow, whichever is longest. After every"
        f" {ROUND} all connections were closed, and nothing might be held by routers or engines."
        f" At the end a decode replica was killed, and another one had to come, be ready with every"
        f" peer, and give the same answers."
        f" Which requests these are follows from the seed {record.seed} alone."
    )


def _counts(counter: Counter[int] | Counter[str]) -> str:
    pairs = sorted((str(name), num) for name, num in counter.items())
    return ", ".join(f"{name}: {num}" for name, num in pairs) or "-"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *rest = rows
    lines = [head, tuple("---" for _ in head), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
