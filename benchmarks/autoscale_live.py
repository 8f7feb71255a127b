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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from benchmarks import autoscale_live_report
from benchmarks.autoscale_live_record import (
    LoadPhase,
    LoadPhaseRecord,
    Record,
    Sample,
    Speed,
    judge,
)
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
from kvtransfer.phase import PHASES

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0
SAMPLE_S = 1.0
NUM_MEASURED = 5
"""Times that the speed of one replica is measured; the median counts."""
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

    async def run(self, load: "Load") -> Record:
        """All phases of a load, one after the other, once it is known how fast one replica is.

        Raises:
            LiveError: the cluster did not start.
            SystemFailedError: the cluster's own process ended.
        """
        await self._await_start()
        say("measuring one replica of each pool")
        speed = await self._measure(load)
        say(
            f"a long prompt takes {speed.prompt_s * 1e3:.0f} ms,"
            f" a token of {load.batch} answers at once {speed.token_s * 1e3:.1f} ms"
        )
        start_s = time.monotonic()
        records = []
        async with asyncio.TaskGroup() as background:
            watch = background.create_task(self._watch())
            for phase in load.phases(speed):
                records.append(await self._put(phase))
            watch.cancel()
        return Record(
            start_s=start_s,
            speed=speed,
            phases=tuple(records),
            outcomes=tuple(self._outcomes),
            samples=tuple(self._samples),
        )

    async def _await_start(self) -> None:
        until_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until_s:
            self._system.check_alive()
            seen = await scrape(self._port)
            if seen is not None and all(seen.num_live[pool] == 1 for pool in PHASES):
                return
            await asyncio.sleep(SAMPLE_S)
        raise LiveError(f"not ready: {self._system.log_tail()}")

    async def _measure(self, load: "Load") -> Speed:
        """One long prompt at a time, and then as many answers at once as a replica writes."""
        prompt_s, token_s = [], []
        for _ in range(NUM_MEASURED):
            (prompt,) = await self._at_once(1, prompt_tokens=load.long_prompt, output_tokens=2)
            prompt_s.append(_measured(prompt, autoscale_live_report.ttft_s))
        for _ in range(NUM_MEASURED):
            answers = await self._at_once(load.batch, prompt_tokens=50, output_tokens=100)
            token_s += [_measured(each, autoscale_live_report.itl_s) for each in answers]
        return Speed(prompt_s=median(prompt_s), token_s=median(token_s))

    async def _at_once(
        self, number: int, *, prompt_tokens: int, output_tokens: int
    ) -> list[Outcome]:
        asked = (self._ask("alone", prompt_tokens, output_tokens) for _ in range(number))
        return await asyncio.gather(*asked)

    async def _put(self, phase: LoadPhase) -> LoadPhaseRecord:
        """Puts a phase's load on, as many seconds as it says, or until both pools are small."""
        say(f"{phase.name}: {phase.describe()}")
        start_s = time.monotonic()
        async with asyncio.TaskGroup() as requests:
            while (lasted_s := time.monotonic() - start_s) < phase.most_s:
                if lasted_s > phase.least_s and (not phase.until_small or self._is_small()):
                    break
                requests.create_task(self._keep(phase))
                await asyncio.sleep(self._rng.expovariate(phase.rate))
            end_s = time.monotonic()
        say(f"{phase.name}: {end_s - start_s:.0f} s, now {self._samples[-1].num_live}")
        return LoadPhaseRecord(phase=phase, start_s=start_s, end_s=end_s)

    async def _keep(self, phase: LoadPhase) -> None:
        outcome = await self._ask(phase.name, phase.prompt_tokens, phase.output_tokens)
        self._outcomes.append(outcome)

    async def _ask(self, name: str, prompt_tokens: int, output_tokens: int) -> Outcome:
        self._num_sent += 1
        fields = {
            "prompt": self._rng.choices(_PROMPT_TOKEN_IDS, k=prompt_tokens),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        case = Case(name=name, path="completions", fields=fields)
        return await self._client.ask(case, cache_salt=str(self._num_sent))

    def _is_small(self) -> bool:
        last = self._samples[-1].num_live
        return all(last[pool] == 1 for pool in PHASES)

    async def _watch(self) -> None:
        while True:
            self._system.check_alive()
            seen = await scrape(self._port)
            if seen is not None:
                self._samples.append(
                    Sample(at_s=time.monotonic(), num_live={p: seen.num_live[p] for p in PHASES})
                )
            await asyncio.sleep(SAMPLE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is put on the cluster, in parts of what one replica does by itself."""

    long_prompt: int
    prompt_load: float
    long_answer: int
    answer_load: float
    batch: int
    """Answers that one decode replica writes at once."""
    step_s: float
    calm_s: float

    def phases(self, speed: Speed) -> tuple[LoadPhase, ...]:
        """Calm, long prompts, calm, long answers, calm."""
        answer_s = self.long_answer * speed.token_s / self.batch
        return (
            LoadPhase(
                name="calm", prompt_tokens=100, output_tokens=8, rate=0.5, least_s=20, most_s=20
            ),
            LoadPhase(
                name="long prompts",
                prompt_tokens=self.long_prompt,
                output_tokens=8,
                rate=self.prompt_load / speed.prompt_s,
                least_s=self.step_s,
                most_s=self.step_s,
                grows="prefill",
            ),
            _calm("calm again", self.calm_s),
            LoadPhase(
                name="long answers",
                prompt_tokens=50,
                output_tokens=self.long_answer,
                rate=self.answer_load / answer_s,
                least_s=self.step_s,
                most_s=self.step_s,
                grows="decode",
            ),
            _calm("calm at the end", self.calm_s),
        )


def _measured(outcome: Outcome, what: Callable[[Outcome], float | None]) -> float:
    value = what(outcome)
    if value is None:
        raise LiveError(f"a request failed by itself: {outcome.error}")
    return value


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    load = Load(
        long_prompt=options.long_prompt,
        prompt_load=options.prompt_load,
        long_answer=options.long_answer,
        answer_load=options.answer_load,
        batch=options.batch,
        step_s=options.step_s,
        calm_s=options.calm_s,
    )
    adopt_orphans()
    try:
        say("starting the cluster")
        with started(launch_pdserve, options.config) as system:
            with real_time_priority():
                record = asyncio.run(LiveRun(system, seed=options.seed).run(load))
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


def _calm(name: str, most_s: float) -> LoadPhase:
    return LoadPhase(
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
        " watches each pool grow for its own load and shrink again. How much that is depends on"
        " how fast one replica of each is found to be at the start. The exit status is 0 only if"
        " the right pool and no other grew each time, both went back and no request failed. Takes"
        " about ten minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--long-prompt", type=int, default=1500, help="tokens of a long prompt")
    parser.add_argument(
        "--prompt-load",
        type=float,
        default=0.95,
        help="long prompts, in parts of what one prefill replica reads by itself",
    )
    parser.add_argument("--long-answer", type=int, default=300, help="tokens of a long answer")
    parser.add_argument(
        "--answer-load",
        type=float,
        default=1.0,
        help="long answers, in parts of what one decode replica writes by itself",
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="the config's engine.max_num_seqs of decode"
    )
    parser.add_argument("--step-s", type=float, default=150.0, help="how long each step lasts")
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
