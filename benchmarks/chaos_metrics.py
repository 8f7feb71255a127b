"""What the router's `/metrics` say, as far as the chaos run wants to know.

Owns the names of the metrics it reads. What is absent reads as nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos_faults import POOLS, PoolName

_HELD = (
    "pdserve_inflight",
    "pdserve_replica_running",
    "pdserve_replica_waiting",
    "pdserve_replica_kv_usage_fraction",
)
_MOVES = "pdserve_moves"
_MOVES_PREFIX = "pdserve_move"
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """One look: live replicas, what requests hold (one line each), counts of moves by labels.

    `num_moves` is their sum, or None where the router does not count moves.
    """

    num_live: Mapping[PoolName, int]
    held: tuple[str, ...]
    moves: Mapping[str, float]
    num_moves: int | None


def read_metrics(text: str) -> Scrape:
    """Reads Prometheus text."""
    num_live: dict[PoolName, int] = dict.fromkeys(POOLS, 0)
    held: list[str] = []
    moves: dict[str, float] = {}
    num_moves: float | None = None
    for family in text_string_to_metric_families(text):
        if family.name == _MOVES:  # without a sample until the first one
            num_moves = sum(each.value for each in family.samples if each.name == f"{_MOVES}_total")
        for sample in family.samples:
            labels = ", ".join(f"{name} {value}" for name, value in sample.labels.items())
            if sample.name == "pdserve_replicas" and sample.labels["pool"] in num_live:
                num_live[sample.labels["pool"]] += int(sample.value)
            elif sample.name in _HELD and sample.value:
                held.append(f"{sample.name} ({labels}): {sample.value:g}")
            elif sample.name.startswith(_MOVES_PREFIX) and sample.name.endswith("_total"):
                name = f"{sample.name} ({labels})" if labels else sample.name
                moves[name] = moves.get(name, 0.0) + sample.value
    return Scrape(
        num_live=num_live,
        held=tuple(held),
        moves=moves,
        num_moves=None if num_moves is None else round(num_moves),
    )


async def scrape(base_url: str) -> Scrape | None:
    """Looks at the router of `base_url`; None if it does not answer now."""
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            response = await client.get(f"{base_url.removesuffix('/v1')}/metrics")
    except httpx.HTTPError:
        return None  # it is looked at again: what to make of a silence is the caller's to say
    return read_metrics(response.text) if response.status_code == 200 else None
