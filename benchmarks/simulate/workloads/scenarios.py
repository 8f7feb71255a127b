"""Synthetic workloads for autoscalers: steps, a ramp, bursts, a shift of prompt lengths.

Forty minutes each, of which the first ten are calm: they warm up what plans from the past. Rates
are relative to a base rate that the caller fits to the fleet.
"""

import math
import random
from collections.abc import Callable

from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.workloads.lengths import Lognormal, poisson

DURATION_S = 2400.0
CALM_S = 600.0
RISE_S, SHIFT_S = 900.0, 1200.0
"""When `steps` rises first, and when `prompt-shift` shifts."""

_PROMPTS = Lognormal(mean=4000, sigma=0.7, least=16, most=16384)
_ANSWERS = Lognormal(mean=300, sigma=0.7, least=2, most=1024)
_LONG_PROMPTS = Lognormal(mean=8000, sigma=0.5, least=16, most=24576)
_SHORT_ANSWERS = Lognormal(mean=100, sigma=0.7, least=2, most=512)


def _steps(time_s: float) -> float:
    """Up threefold after 15 minutes, down to a half after 30."""
    if time_s < RISE_S:
        return 1.0
    return 3.0 if time_s < 1800 else 0.5


def _ramp(time_s: float) -> float:
    """One slow wave between 0.5 and 3.5, in half an hour."""
    wave_s = max(time_s - CALM_S, 0.0)
    return 2.0 - 1.5 * math.cos(2 * math.pi * wave_s / (DURATION_S - CALM_S))


def _bursts(time_s: float) -> float:
    """A minute of three times the load, every five."""
    return 3.0 if time_s % 300 >= 240 else 1.0


def _constant(time_s: float) -> float:
    return 1.5


def _same_lengths(time_s: float, rng: random.Random) -> tuple[int, int]:
    return _PROMPTS.draw(rng), _ANSWERS.draw(rng)


def _shifting_lengths(time_s: float, rng: random.Random) -> tuple[int, int]:
    """From 20 minutes on, prompts are twice as long and answers a third."""
    if time_s < SHIFT_S:
        return _same_lengths(time_s, rng)
    return _LONG_PROMPTS.draw(rng), _SHORT_ANSWERS.draw(rng)


_SHAPES: dict[
    str, tuple[Callable[[float], float], Callable[[float, random.Random], tuple[int, int]]]
] = {
    "steps": (_steps, _same_lengths),
    "ramp": (_ramp, _same_lengths),
    "bursts": (_bursts, _same_lengths),
    "prompt-shift": (_constant, _shifting_lengths),
}
SCENARIOS = tuple(_SHAPES)


def make_scenario(
    name: str, *, base_rate: float, seed: int, duration_s: float = DURATION_S
) -> list[Arrival]:
    """The scenario with Poisson arrivals at `base_rate` requests per second times its shape.

    A shorter `duration_s` squeezes the shape into it.
    """
    shape, lengths = _SHAPES[name]
    stretch = DURATION_S / duration_s
    return poisson(
        lambda time_s: base_rate * shape(time_s * stretch),
        most=3.5 * base_rate,
        duration_s=duration_s,
        lengths=lambda time_s, rng: lengths(time_s * stretch, rng),
        seed=seed,
    )
