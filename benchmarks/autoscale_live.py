"""Autoscaling on a live cluster: each pool grows for its own load, and both shrink again.

Owns the command line, the cluster's beginning and end, and the order of the phases.
`python -m benchmarks.autoscale_live --help` is the command; its exit status is the result.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import autoscale_live_report
from benchmarks.autoscale_live_record import POOLS, Phase, PhaseRecord, Record, Sample, judge
from benchmarks.chaos_cases import Case
from benchmarks.chaos_client import Client, Outcome
from benchmarks.chaos_metrics import scrape
from benchmarks.chaos_processes import end
from benchmarks.load import real_time_priority
from benchmarks.machine import observe_machine
from benchmarks.systems import (
    RunningSystem,
    SystemFailedError,
    adopt_orphans,
    launch_pdserve,
    started,
)

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0
SAMPLE_S = 1.0
# Ordinary tokens of the demo model.
_PROMPT_TOKEN_IDS = range(10, 760)
_FOLDER = Path(__file__).resolve().parent
_START_S = time.monotonic()


class LiveError(RuntimeError):
    """There is no result: the cluster did not start."""


def say(text: str) -> None:
    """Prints a line of progress, with the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _START_S), 60)
    print(f"{minutes:3d}:{seconds:02d}  {text}", flush=True)


class LiveRun:
    """Owns the outcomes and the samples of one run on one running cluster."""

    def __init__(self, system: RunningSystem, *, seed: int) -> None:
        self._system = system
        self._port = urlsplit(system.url).port or 80
        self._client = Client(system.url, timeout_s=REQUEST_TIMEOUT_S)
        self._rng = random.Random(seed)
        self._outcomes: list[Outcome] = []
        self._samples: list[Sample] = []
        self._num_sent = 0

    async def run(self, phases: tuple[Phase, ...]) -> Record:
        """All phases, one after the other.

        Raises:
            LiveError: the cluster did not start.
            SystemFailedError: the cluster's own process ended.
        """
        await self._await_start()
        start_s = time.monotonic()
        records = []
        async with asyncio.TaskGroup() as background:
            watch = background.create_task(self._watch())
            for phase in phases:
                records.append(await self._put(phase))
            watch.cancel()
        return Record(
            start_s=start_s,
            phases=tuple(records),
            outcomes=tuple(self._outcomes),
            samples=tuple(self._samples),
        )

    async def _await_start(self) -> None:
        until_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until_s:
            self._system.check_alive()
            seen = await scrape(self._port)
            if seen is not None and all(seen.num_live[pool] == 1 for pool in POOLS):
                return
            await asyncio.sleep(SAMPLE_S)
        raise LiveError(f"not ready: {self._system.log_tail()}")

    async def _put(self, phase: Phase) -> PhaseRecord:
        """Puts a phase's load on, as many seconds as it says, or until both pools are small."""
        say(f"{phase.name}: {phase.describe()}")
        start_s = time.monotonic()
        async with asyncio.TaskGroup() as requests:
            while (lasted_s := time.monotonic() - start_s) < phase.most_s:
                if lasted_s > phase.least_s and (not phase.until_small or self._is_small()):
                    break
                requests.create_task(self._ask(phase))
                await asyncio.sleep(self._rng.expovariate(phase.rate))
            end_s = time.monotonic()
        say(f"{phase.name}: {end_s - start_s:.0f} s, now {self._samples[-1].num_live}")
        return PhaseRecord(phase=phase, start_s=start_s, end_s=end_s)

    async def _ask(self, phase: Phase) -> None:
        self._num_sent += 1
        prompt = self._rng.choices(_PROMPT_TOKEN_IDS, k=phase.prompt_tokens)
        fields = {
            "prompt": prompt,
            "max_tokens": phase.output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        case = Case(name=phase.name, path="completions", fields=fields)
        self._outcomes.append(await self._client.ask(case, cache_salt=str(self._num_sent)))

    def _is_small(self) -> bool:
        last = self._samples[-1].num_live
        return all(last[pool] == 1 for pool in POOLS)

    async def _watch(self) -> None:
        while True:
            self._system.check_alive()
            seen = await scrape(self._port)
            if seen is not None:
                self._samples.append(
                    Sample(at_s=time.monotonic(), num_live={p: seen.num_live[p] for p in POOLS})
                )
            await asyncio.sleep(SAMPLE_S)


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    phases = (
        Phase(name="calm", prompt_tokens=100, output_tokens=8, rate=0.5, least_s=20, most_s=20),
        Phase(
            name="long prompts",
            prompt_tokens=options.long_prompt,
            output_tokens=8,
            rate=options.prompt_rate,
            least_s=options.step_s,
            most_s=options.step_s,
            grows="prefill",
        ),
        _calm("calm again", options.calm_s),
        Phase(
            name="long answers",
            prompt_tokens=50,
            output_tokens=options.long_answer,
            rate=options.answer_rate,
            least_s=options.step_s,
            most_s=options.step_s,
            grows="decode",
        ),
        _calm("calm at the end", options.calm_s),
    )
    adopt_orphans()
    try:
        say("starting the cluster")
        with started(launch_pdserve, options.config) as system:
            with real_time_priority():
                record = asyncio.run(LiveRun(system, seed=options.seed).run(phases))
            say("ending the cluster")
            left = end(system.process)
    except (LiveError, SystemFailedError) as failure:
        print(f"no result: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    reasons = judge(record) + tuple(f"a process was left: {each}" for each in left)
    autoscale_live_report.write(
        options.out, record, reasons, config=options.config, machine=observe_machine()
    )
    say(f"written to {options.out}")
    print(f"\n{autoscale_live_report.phase_table(record)}\n")
    for reason in reasons:
        print(f"it did not hold: {reason}")
    print(json.dumps({"held": not reasons, "requests": len(record.outcomes)}))
    return 1 if reasons else 0


def _calm(name: str, most_s: float) -> Phase:
    return Phase(
        name=name,
        prompt_tokens=100,
        output_tokens=8,
        rate=0.5,
        least_s=10,
        most_s=most_s,
        until_small=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoscale_live",
        description="Puts long prompts on a cluster of one and one, then many long answers, and"
        " watches each pool grow for its own load and shrink again. The exit status is 0 only if"
        " the right pool and no other grew each time, both went back and no request failed. Takes"
        " about six minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--long-prompt", type=int, default=1500, help="tokens of a long prompt")
    parser.add_argument("--prompt-rate", type=float, default=9.0, help="long prompts a second")
    parser.add_argument("--long-answer", type=int, default=300, help="tokens of a long answer")
    parser.add_argument("--answer-rate", type=float, default=6.0, help="long answers a second")
    parser.add_argument("--step-s", type=float, default=90.0, help="how long each step lasts")
    parser.add_argument("--calm-s", type=float, default=120.0, help="longest wait to shrink")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and prompts")
    parser.add_argument(
        "--config", type=Path, default=_FOLDER / "configs" / "autoscale_live.yaml", help="to serve"
    )
    parser.add_argument(
        "--out", type=Path, default=_FOLDER / "results" / "autoscale_live.md", help="the report"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
