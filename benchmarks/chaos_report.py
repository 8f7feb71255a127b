"""What a chaos run's report looks like.

Owns the Markdown file and the summary for the terminal. Never measures, never judges.
"""

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos_cases import UNREAD, base_cases
from benchmarks.chaos_failover import NUM_REQUESTS
from benchmarks.chaos_faults import DESCRIPTIONS, Kind
from benchmarks.chaos_poison import NUM_INNOCENT
from benchmarks.chaos_run import BURST_S, RunOptions
from benchmarks.chaos_verdict import (
    PAUSE_DEFINITION,
    ROUTER_WINDOW_S,
    Injected,
    Pause,
    Record,
    Verdict,
    moves_by_fault,
)
from benchmarks.load import percentile
from benchmarks.machine import Machine

_MAX_LINES = 20
_MAX_GROWTHS = 5


def write(
    path: Path,
    record: Record,
    verdict: Verdict,
    *,
    options: RunOptions,
    machine: Machine,
) -> None:
    """Writes the report to `path`, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(record, verdict, options=options, machine=machine, name=path.stem))


def report(
    record: Record, verdict: Verdict, *, options: RunOptions, machine: Machine, name: str
) -> str:
    """The whole report; the chart is expected beside it, as `name`.png."""
    held = "**It held.**" if not verdict.reasons else "**It did not hold:**"
    sections = [
        "# Chaos\n\nWritten by `python -m benchmarks.chaos`; do not edit.",
        "\n".join([held, "", *(f"- {reason}" for reason in verdict.reasons)]).rstrip(),
        summary_table(record, verdict),
        f"![Requests under way, live replicas and faults over time]({name}.png)",
        f"## Faults\n\n{_fault_table(record, verdict)}",
        f"## Moves by cause\n\n{_moves(record)}",
        _lines("Failures", [f"{num} times: {error}" for error, num in verdict.failures.items()]),
        _lines("Wrong answers", verdict.wrong),
        f"## How it was measured\n\n{_method(record, options)}",
        f"## Machine\n\n{machine.markdown()}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def summary_table(record: Record, verdict: Verdict) -> str:
    """The numbers of the run; Markdown."""
    whole_s = record.whole_after_s
    covered = [pause for pause in verdict.pauses if _had_another(record.faults[pause.fault])]
    rows = [
        ["", "value"],
        ["requests", f"{verdict.num_requests}"],
        ["of them, left by their client", f"{verdict.num_left}"],
        ["of them, ended with their router", f"{verdict.num_ended_with_router}"],
        ["failed", f"{verdict.num_failed}"],
        ["wrong", f"{len(verdict.wrong)}"],
        ["faults", f"{len(record.faults)}"],
        ["moved", f"{verdict.num_moved}"],
        ["streams that clients saw move", f"{len(verdict.pauses)}"],
        ["recovery pause p50 / p99 / longest", _percentiles(verdict.pauses)],
        ["of them, while their pool had another replica", _percentiles(covered)],
        ["from a fault to a waited-for first token", _percentiles(verdict.first_token_waits)],
        ["whole pools after the last answer", "never" if whole_s is None else f"{whole_s:.0f} s"],
        *_router_rows(record),
        *_unread_rows(record),
        *_failover_rows(record),
        *_poison_rows(record),
        *_growth_rows(record),
        ["held at the end", f"{len(record.held)}"],
        ["processes left at the end", f"{len(record.left)}"],
    ]
    return _table(rows)


def _router_rows(record: Record) -> list[list[str]]:
    if not record.router_deaths:
        return []
    freed = [death.freed_after_s for death in record.router_deaths]
    shown = ", ".join("never" if after_s is None else f"{after_s:.2f} s" for after_s in freed)
    return [["engines free of a dead router's requests after", shown]]


def _unread_rows(record: Record) -> list[list[str]]:
    if not record.unread:
        return []
    grown = ", ".join(f"{each.grown_bytes / 2**20:.1f} MiB" for each in record.unread)
    others = ", ".join(f"{each.num_others}" for each in record.unread)
    return [
        ["a router's growth while a client did not read", grown],
        ["other requests answered in that time", others],
    ]


def _growth_rows(record: Record) -> list[list[str]]:
    return [
        [
            f"memory after the warm-up: `{each.title}`",
            f"{each.fraction:+.1%}, to {each.end_bytes / 2**20:.0f} MiB",
        ]
        for each in record.growths[:_MAX_GROWTHS]
    ]


def _failover_rows(record: Record) -> list[list[str]]:
    rows = []
    for each in record.failovers:
        if each.p99_s is not None:
            shown = (
                f"{each.p99_s:.2f} s, of {len(each.pauses_s)}; at least {each.least_s:.2f} s:"
                f" {each.p99_s / each.least_s:.1f} times that"
            )
            rows.append([f"{each.pool}: pause p99 as one of two engines ends", shown])
    return rows


def _poison_rows(record: Record) -> list[list[str]]:
    if record.poison is None:
        return []
    return [
        ["engines that a request killed before it was refused", f"{record.poison.num_killed}"],
        ["what its client was told", record.poison.error or "nothing: it was answered"],
    ]


def _fault_table(record: Record, verdict: Verdict) -> str:
    pauses, waits = _by_fault(verdict.pauses), _by_fault(verdict.first_token_waits)
    moves = moves_by_fault(record)
    titles = ["at", "fault", "target", "live before", "moves", "streams seen to move"]
    rows = [[*titles, "longest pause", "longest wait for a first token"]]
    for index, fault in enumerate(record.faults):
        live = ", ".join(f"{pool} {num}" for pool, num in fault.num_live.items())
        rows.append(
            [
                f"{fault.at_s - record.start_s:.0f} s",
                fault.kind.value,
                fault.target,
                live,
                f"{moves[index]}" if index in moves else "",
                f"{len(pauses[index])}" if fault.kind.hits_pool else "",
                f"{max(pauses[index]):.2f} s" if pauses[index] else "",
                f"{max(waits[index]):.2f} s" if waits[index] else "",
            ]
        )
    return _table(rows)


def _had_another(fault: Injected) -> bool:
    return fault.pool is not None and fault.num_live[fault.pool] > 1


def _by_fault(pauses: Sequence[Pause]) -> defaultdict[int, list[float]]:
    grouped: defaultdict[int, list[float]] = defaultdict(list)
    for pause in pauses:
        grouped[pause.fault].append(pause.pause_s)
    return grouped


def _moves(record: Record) -> str:
    last = record.samples[-1].seen if record.samples else None
    if last is None or last.num_moves is None:
        return "The router exports no count of moves: those that clients saw were counted."
    return _table([["metric", "count"], *([n, f"{v:g}"] for n, v in last.moves.items())])


def _percentiles(pauses: Sequence[Pause]) -> str:
    if not pauses:
        return "none"
    values_s = [pause.pause_s for pause in pauses]
    shown = (percentile(values_s, 0.5), percentile(values_s, 0.99), max(values_s))
    return " / ".join(f"{value_s:.2f}" for value_s in shown) + f" s, of {len(values_s)}"


def _lines(title: str, lines: Sequence[str]) -> str | None:
    if not lines:
        return None
    shown = [f"- {line}" for line in lines[:_MAX_LINES]]
    if len(lines) > _MAX_LINES:
        shown.append(f"- and {len(lines) - _MAX_LINES} more")
    return "\n".join([f"## {title}", "", *shown])


def _method(record: Record, options: RunOptions) -> str:
    speed, pace = record.speed, record.pace
    names = ", ".join(case.name for case in base_cases())
    lines = [f"- `{kind.value}`: {DESCRIPTIONS[kind]}." for kind in options.kinds]
    lines += [f"- `{kind.value}`: left out, as {why}." for kind, why in options.left_out.items()]
    faults = "\n".join(lines)
    last = "is left alone" if options.spare_last else "may be hit"
    replicas = " and ".join(f"{num} {pool}" for pool, num in options.num_replicas.items())
    num_routers = options.num_routers
    routers = "one router" if num_routers == 1 else f"{num_routers} routers"
    paragraphs = [
        f"A cluster of {replicas} replicas of the demo model in float32, behind {routers}. Before"
        " any fault each case was asked alone, which gave the answers to compare with, then all at"
        " once, which had to give the same. How fast this machine is was measured next: a replica"
        f" of each pool was killed, others answered in their place after {speed.start_s:.0f} s, and"
        f" meanwhile all cases, asked at once, were answered at {speed.rate:.2f} a second. Then"
        f" requests arrived for {pace.duration_s:.0f} s at {pace.rate:.2f} a second on average,"
        f" {options.pressure.load:g} of that rate (Poisson, open loop), each drawn from the cases,"
        f" and in the {BURST_S:g} s before each fault {options.burst} more. Three of four carry a"
        " cache salt of their own, so that no prefix cache answers them. A request failed if it"
        f" had no whole answer after {pace.timeout_s:.0f} s, {options.pressure.patience:g} of these"
        " starts, and is wrong if a token, the text, the reason for its end, the usage or (by more"
        " than the digits that batching changes) a logprob differs. Clients that left count as"
        " neither, nor do requests whose connection"
        f" broke within {ROUTER_WINDOW_S:g} s of their router's death, as far as it had so many."
        f" The seed was {options.seed}.",
        f"Cases, all greedy or seeded: {names}; some of them with a stop string as well; and"
        f" {UNREAD.name} for the client that does not read.",
        f"A fault came every {pace.fault_every_s:.0f} s, {options.pressure.fault_every:g} of a"
        " start, in shuffled rounds of all kinds, in the pool with more live replicas; the last"
        f" live replica of a pool {last}, and a pool without any is left alone. Leases cannot be"
        " made to expire from outside: that has a test of its own.",
        "An engine was free of a dead router's requests when all engines together had no more"
        f" requests than the other routers had sent; it had {pace.freed_within_s:.1f} s for that."
        f" At the end, on the idle and whole cluster, one engine of each pool was killed under"
        f" {NUM_REQUESTS} streams: of 400 tokens for decode, of prompts of 500 tokens and more for"
        " prefill. The least that their pause can be is what the engines that were left took,"
        " right after and with nothing else to do, to compute as many tokens as these requests"
        " had. Then came one more request, to one router, and whatever engine worked on it was"
        f" killed, while each of the other routers had {NUM_INNOCENT} requests at any time. A"
        f" crowd's answers had {pace.crowd_tokens} tokens each, about what one replica computes in"
        " a start.",
    ]
    waits = (
        "Waits for a first token are those of streams that were asked for before the fault and had"
        " no token when it came, whether or not their replica was the one that was hit. Moves are"
        " the router's count, until the next fault that costs a replica."
    )
    wrapped = "\n\n".join(textwrap.fill(each, 100) for each in paragraphs)
    definition = textwrap.fill(f"{PAUSE_DEFINITION} {waits}", 100)
    return f"{wrapped}\n\n{faults}\n\n{definition}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def describe_kinds() -> str:
    """The kinds of faults for `--help`."""
    return "; ".join(f"{kind.value}: {DESCRIPTIONS[kind]}" for kind in Kind)
