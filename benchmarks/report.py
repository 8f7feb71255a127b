"""The comparison's verdict: medians, ratios, targets, and the files that say so.

Owns what the result files look like. Pure but for `write`; never measures, never draws.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.load import Load
from benchmarks.machine import Machine
from benchmarks.measure import CLIENTS_8, CLIENTS_32, LONG_PROMPT, SHORT_PROMPT, Metrics
from benchmarks.systems import MAX_MODEL_LEN

Rounds = Mapping[str, Sequence[Metrics]]
"""The metrics of each system, one for each round."""
Summary = Mapping[str, Mapping[str, Mapping[str, float]]]
"""`{system: {metric: {median, min, max}}}`, as in compare.json."""

METRICS: tuple[str, ...] = tuple(field.name for field in fields(Metrics))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """How a metric is shown: its value times `scale` in `unit`, with so many digits."""

    title: str
    unit: str = "ms"
    scale: float = 1e3
    digits: int = 1

    def format(self, value: float) -> str:
        """The value alone."""
        return f"{value * self.scale:,.{self.digits}f}"


def _throughput(title: str) -> Shown:
    return Shown(title=title, unit="tokens/s", scale=1, digits=0)


SHOWN: Mapping[str, Shown] = {
    "ttft_s_p50_20": Shown(title="TTFT p50, one client, 20-token prompt"),
    "ttft_s_p50_500": Shown(title="TTFT p50, one client, 500-token prompt"),
    "itl_s_mean": Shown(title="mean ITL, one client"),
    "handover_s_p50": Shown(title="first token to second p50, one client"),
    "tokens_per_s_c8": _throughput("output, 8 clients, 200 in / 32 out"),
    "ttft_s_p50_c8": Shown(title="TTFT p50, 8 clients"),
    "ttft_s_p90_c8": Shown(title="TTFT p90, 8 clients"),
    "tokens_per_s_c32": _throughput("output, 32 clients, 200 in / 32 out"),
    "ttft_s_p50_c32": Shown(title="TTFT p50, 32 clients"),
    "ttft_s_p90_c32": Shown(title="TTFT p90, 32 clients"),
    "idle_cores": Shown(title="idle, all processes", unit="cores", scale=1, digits=2),
    "client_cores_c32": Shown(title="load generator, 32 clients", unit="cores", scale=1, digits=2),
}

SUBJECT = "pdserve"
"""With its defaults: decode reads a prompt itself where that is predicted to be sooner."""
SPLIT = "pdserve-split"
"""Its demo: prefill reads every prompt, and every block travels by NIXL."""
SUBJECT_TITLES: Mapping[str, str] = {SUBJECT: "pdserve", SPLIT: "pdserve, always split"}
BEFORE = "before"
"""Another checkout's demo."""
PEER_TITLES: Mapping[str, str] = {
    "vllm": "bare vLLM",
    "ray-llm": "Ray Serve LLM P/D",
    "ray-llm-tuned": "tuned Ray Serve LLM P/D",
    BEFORE: "pdserve before",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on this project's `metric`, divided by `over`.

    That is a peer, of which the same metric is meant, or another metric of this project.
    """

    metric: str
    over: str
    bound: Literal["at most", "at least"]
    limit: float

    @property
    def over_peer(self) -> bool:
        """Whether `over` names a system, and not a metric."""
        return self.over in PEER_TITLES


TARGETS = (
    Target(metric="ttft_s_p50_20", over="vllm", bound="at most", limit=1.5),
    Target(metric="ttft_s_p50_20", over="ray-llm-tuned", bound="at most", limit=0.3),
    Target(metric="ttft_s_p50_500", over="vllm", bound="at most", limit=1.3),
    Target(metric="ttft_s_p50_500", over="ray-llm-tuned", bound="at most", limit=0.5),
    Target(metric="itl_s_mean", over="vllm", bound="at most", limit=1.3),
    Target(metric="itl_s_mean", over="ray-llm-tuned", bound="at most", limit=1.0),
    Target(metric="tokens_per_s_c8", over="ray-llm-tuned", bound="at least", limit=1.8),
    Target(metric="tokens_per_s_c32", over="vllm", bound="at least", limit=0.75),
    Target(metric="tokens_per_s_c32", over="ray-llm-tuned", bound="at least", limit=1.6),
    Target(metric="handover_s_p50", over="itl_s_mean", bound="at most", limit=3.0),
    Target(metric="ttft_s_p50_20", over=BEFORE, bound="at most", limit=1.02),
    Target(metric="ttft_s_p50_500", over=BEFORE, bound="at most", limit=1.02),
    Target(metric="itl_s_mean", over=BEFORE, bound="at most", limit=1.02),
    Target(metric="tokens_per_s_c8", over=BEFORE, bound="at least", limit=0.98),
    Target(metric="tokens_per_s_c32", over=BEFORE, bound="at least", limit=0.98),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A target and the median, over the rounds, of what was measured in each."""

    target: Target
    ratio: float

    @property
    def met(self) -> bool:
        """Whether the ratio is within the limit."""
        if self.target.bound == "at most":
            return self.ratio <= self.target.limit
        return self.ratio >= self.target.limit


def values_of(rounds: Rounds, system: str, metric: str) -> tuple[float, ...]:
    """One metric of one system, round by round."""
    return tuple(float(getattr(metrics, metric)) for metrics in rounds[system])


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of each round's ratio: what drifts from round to round cancels out."""
    return median(
        numerator / denominator
        for numerator, denominator in zip(numerators, denominators, strict=True)
    )


def judge(rounds: Rounds, subject: str = SUBJECT) -> tuple[Verdict, ...]:
    """The verdict on each target whose systems were measured; none on what was not."""
    return tuple(
        Verdict(
            target=target,
            ratio=median_ratio(
                values_of(rounds, subject, target.metric),
                values_of(rounds, target.over, target.metric)
                if target.over_peer
                else values_of(rounds, subject, target.over),
            ),
        )
        for target in TARGETS
        if subject in rounds and (target.over in rounds or not target.over_peer)
        if target.over != BEFORE or subject == SPLIT  # Like with like.
    )


def ratio_tables(rounds: Rounds) -> str:
    """What was measured, the target, and whether it is met, a column for each 1; Markdown.

    A table for each way that this project was run, none where nothing is to be judged.
    """
    judged = {title: judge(rounds, subject) for subject, title in SUBJECT_TITLES.items()}
    return "\n\n".join(_ratio_table(title, each) for title, each in judged.items() if each)


def _ratio_table(title: str, verdicts: Sequence[Verdict]) -> str:
    cells = {(verdict.target.metric, verdict.target.over): verdict for verdict in verdicts}
    overs = tuple(dict.fromkeys(over for _, over in cells))
    ones = {**PEER_TITLES, **{metric: f"its own {shown.title}" for metric, shown in SHOWN.items()}}
    rows = [[title, *(f"{ones[over]} = 1" for over in overs)]]
    rows += [
        [SHOWN[metric].title, *(_verdict_cell(cells.get((metric, over))) for over in overs)]
        for metric in dict.fromkeys(metric for metric, _ in cells)
    ]
    return _markdown(rows)


def median_table(rounds: Rounds) -> str:
    """Each metric's median for each system, with the range over the rounds; Markdown."""
    titles = {**PEER_TITLES, **SUBJECT_TITLES}
    rows = [["", *(titles[system] for system in rounds)]]
    rows += [
        [
            f"{shown.title}, {shown.unit}",
            *(_range_cell(values_of(rounds, system, metric), shown) for system in rounds),
        ]
        for metric, shown in SHOWN.items()
    ]
    return _markdown(rows)


def summarise(rounds: Rounds) -> Summary:
    """The median and the range of each metric over the rounds."""
    return {
        system: {
            metric: {"median": median(values), "min": min(values), "max": max(values)}
            for metric in METRICS
            for values in [values_of(rounds, system, metric)]
        }
        for system in rounds
    }


def compare_json(rounds: Rounds) -> str:
    """The summary as JSON."""
    return json.dumps(summarise(rounds), indent=2) + "\n"


def compare_markdown(rounds: Rounds, machine: Machine) -> str:
    """The whole report."""
    num_rounds = min(len(metrics) for metrics in rounds.values())
    ratios = ratio_tables(rounds)
    sections = [
        "# Comparison\n\nWritten by `make bench`; do not edit.",
        f"## Ratios, and what they must be\n\n{ratios}" if ratios else None,
        f"## Medians of {num_rounds} rounds (lowest to highest)\n\n{median_table(rounds)}",
        "![The same as a chart](compare.png)",
        f"## How it was measured\n\n{_METHOD.rstrip()}",
        f"## Machine\n\n{machine.markdown()}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def write(rounds: Rounds, machine: Machine, folder: Path) -> None:
    """Writes `compare.json` and `compare.md`, making the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(compare_json(rounds))
    (folder / "compare.md").write_text(compare_markdown(rounds, machine))


README_BEGIN, README_END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
README_SYSTEMS = ("vllm", "ray-llm-tuned", SUBJECT, SPLIT)
README_METRICS = (
    "ttft_s_p50_20",
    "ttft_s_p50_500",
    "itl_s_mean",
    "tokens_per_s_c8",
    "tokens_per_s_c32",
)


def embed(text: str, summary: Summary) -> str:
    """`text`, a README, with the short table between its markers made anew."""
    before, begin, rest = text.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not (begin and end):
        raise ValueError(f"no {README_BEGIN} and {README_END} to write the table between")
    return f"{before}{begin}\n{readme_table(summary)}\n{end}{after}"


def readme_table(summary: Summary) -> str:
    """The medians that say most, of the systems of `README_SYSTEMS` that were measured."""
    titles = {**PEER_TITLES, **SUBJECT_TITLES}
    systems = [system for system in README_SYSTEMS if system in summary]
    rows = [["median", *(titles[system] for system in systems)]]
    rows += [
        [
            f"{SHOWN[metric].title}, {SHOWN[metric].unit}",
            *(SHOWN[metric].format(summary[system][metric]["median"]) for system in systems),
        ]
        for metric in README_METRICS
    ]
    return _markdown(rows)


def _describe(load: Load) -> str:
    clients = "one client" if load.num_clients == 1 else f"{load.num_clients} clients"
    return (
        f"{load.num_requests} requests of {load.prompt_tokens} tokens in and {load.output_tokens}"
        f" out from {clients}"
    )


_METHOD = f"""\
In each round every system in turn is started, alone on the machine, warmed up, put under the same
loads, and stopped. A ratio is taken within a round; the tables show the median over the rounds. All
serve the demo model (eager, in the dtype vLLM picks, {MAX_MODEL_LEN} positions) with one thread an
engine and 1 GiB of KV cache; the split systems have one prefill and one decode engine.

pdserve is measured twice. With its defaults decode reads a prompt itself where that is predicted to
be sooner, which with little to do it mostly is (`router.local_prefill: auto`), and copies what
prefill has read out of shared memory. "Always split" is the demo: prefill reads every prompt, and
every block travels by NIXL, as in the peers' apps.

- Requests: streamed completions of random token prompts, so that no prefix cache answers; greedy,
  and going on past an end of sequence, so that all answers have the same length. Each client sends
  its next request when one is answered.
- Loads: {_describe(SHORT_PROMPT)}, which also give ITL and the time from first token to second;
  {_describe(LONG_PROMPT)}; {_describe(CLIENTS_8)}; {_describe(CLIENTS_32)}.
- TTFT runs from the request written to the first token read. Mean ITL is the time from a request's
  first token to its last, by the tokens after the first. Ray Serve LLM as shipped sends what 50 ms
  brought in one piece, so first and second token often arrive together.
- Ray Serve LLM samples the first token in decode: what moving the KV takes lies in its TTFT. In
  pdserve the first token comes from prefill, and it lies between first token and second.
- Tuned Ray Serve LLM: direct streaming, HAProxy, unbatched stream, and a NIXL progress thread that
  waits instead of spinning.
- The load generator shares the cores with the system. It runs at real-time priority where it may:
  the engines' queues spin, and would keep it from reading what has arrived.
- Idle: CPU use of all of a system's processes, Ray's included, from two seconds after the last
  answer.
"""


def _verdict_cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    sign = "≤" if verdict.target.bound == "at most" else "≥"
    met = "yes" if verdict.met else "**no**"
    return f"{verdict.ratio:.2f} ({sign} {verdict.target.limit:g}: {met})"


def _range_cell(values: Sequence[float], shown: Shown) -> str:
    middle, low, high = (
        shown.format(value) for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])
