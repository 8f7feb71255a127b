"""Two engines on the same cores: each takes longer while the other is busy.

Owns who slows down whom. An engine that decodes also keeps the router and the clients busy, for
each of its tokens: what they take from the other engine is in the factor.
"""

from dataclasses import dataclass

from benchmarks.simulate.model.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """By how many times each phase takes longer while the other pool's engine is busy."""

    prefill: float
    decode: float


def share_cores(prefill: Engine, decode: Engine, contention: Contention) -> None:
    """From now on they slow down each other."""

    def changed() -> None:
        prefill.slow_down(contention.prefill if decode.is_busy else 1.0)
        decode.slow_down(contention.decode if prefill.is_busy else 1.0)

    prefill.on_busy_changed = decode.on_busy_changed = changed
