"""How hard a chaos run presses: its load and its deadlines, from how fast this machine is.

Owns the plan. Pure: benchmarks.chaos_run measures, benchmarks.chaos_report tells.
"""

from dataclasses import dataclass

MIN_FAULTS = 4
"""However slow the machine is: a run without faults shows nothing."""
_FREED_STARTS = 0.1
_LEAST_FREED_S = 2.0
_LEAST_UNREAD_S = 60.0
NUM_CROWD = 256
"""Streams that come at once."""
_CROWD_STARTS = 0.5
_LEAST_CROWD_TOKENS, _MOST_CROWD_TOKENS = 16, 400
_HELD_FAULTS = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured before the run, on the cluster that it disturbs.

    `start_s` is from the end of a replica of each pool until both are replaced, `rate` how many
    requests of the run's mix were answered a second in the meantime, with each pool down to one
    replica, and `token_rate` how many tokens that were.
    """

    start_s: float
    rate: float
    token_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """What is put on a cluster, in parts of its speed."""

    load: float
    """Arrivals, in parts of `Speed.rate`."""
    fault_every: float
    """From one fault to the next, in starts of an engine."""
    patience: float
    """How long a client waits for a whole answer, in starts of an engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The same in seconds. All but `rate` grow with the time that an engine takes to start."""

    duration_s: float
    """How long load is put on."""
    rate: float
    """Requests a second, on average."""
    fault_every_s: float
    timeout_s: float
    """How long a client waits for a whole answer, and the pools may take to be whole again."""
    unread_s: float
    """How long the client that does not read does not."""
    freed_within_s: float
    """How soon no engine may work for a dead router any more."""
    held_s: float
    """How long the node stays as a fault of it has left it: past some more faults."""
    crowd_tokens: int
    """The length of each answer of a crowd, which one replica computes in about half a start."""


def plan_pace(speed: Speed, pressure: Pressure, *, least_s: float) -> Pace:
    """The pace of a run on a machine of that speed, of `least_s` or of a few faults."""
    fault_every_s = pressure.fault_every * speed.start_s
    return Pace(
        duration_s=max(least_s, (MIN_FAULTS + 1) * fault_every_s),
        rate=pressure.load * speed.rate,
        fault_every_s=fault_every_s,
        timeout_s=pressure.patience * speed.start_s,
        # While both pools may be empty nobody else can be answered either.
        unread_s=max(_LEAST_UNREAD_S, 2 * speed.start_s),
        freed_within_s=max(_LEAST_FREED_S, _FREED_STARTS * speed.start_s),
        held_s=_HELD_FAULTS * fault_every_s,
        crowd_tokens=_crowd_tokens(speed),
    )


def _crowd_tokens(speed: Speed) -> int:
    num_tokens = int(_CROWD_STARTS * speed.start_s * speed.token_rate / NUM_CROWD)
    return min(max(num_tokens, _LEAST_CROWD_TOKENS), _MOST_CROWD_TOKENS)
