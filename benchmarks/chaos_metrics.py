"""What the routers' `/metrics` say, as far as the chaos run wants to know.

Owns the names of the metrics it reads. What is absent reads as nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from kvtransfer.phase import PHASES, Phase

_HELD = (
    "pdserve_inflight",
    "pdserve_replica_running",
    "pdserve_replica_waiting",
    "pdserve_replica_kv_usage_fraction",
)
_MOVES = "pdserve_moves"
_ALL_MOVES = (f"{_MOVES}_total", "pdserve_called_back_total")
_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """One look: live replicas, what requests hold (one line each), counts of moves by labels.

    `num_moves` is their sum, or None where the router does not count moves. `num_sent` requests
    are in engines by the router's own count; `num_in_engine` has what each replica says it has,
    whoever sent it. `with_own` are the replicas that have requests of this one router.
    """

    num_live: Mapping[Phase, int]
    held: tuple[str, ...]
    moves: Mapping[str, float]
    num_moves: int | None
    num_routers: int = 1
    num_sent: int = 0
    num_in_engine: Mapping[str, int] = field(default_factory=dict)
    with_own: frozenset[str] = frozenset()


def read_metrics(text: str) -> Scrape:
    """Reads Prometheus text."""
    num_live: dict[Phase, int] = dict.fromkeys(PHASES, 0)
    held: list[str] = []
    moves: dict[str, float] = {}
    num_moves: float | None = None
    num_sent = 0.0
    num_in_engine: Counter[str] = Counter()
    with_own: set[str] = set()
    for family in text_string_to_metric_families(text):
        if family.name == _MOVES:  # without a sample until the first one
            num_moves = sum(each.value for each in family.samples if each.name == f"{_MOVES}_total")
        for sample in family.samples:
            labels = ", ".join(f"{name} {value}" for name, value in sample.labels.items())
            if sample.name == "pdserve_replicas" and sample.labels["pool"] in num_live:
                num_live[sample.labels["pool"]] += int(sample.value)
            elif sample.name == "pdserve_inflight" and sample.labels["phase"] != "waiting":
                num_sent += sample.value
            elif sample.name in ("pdserve_replica_running", "pdserve_replica_waiting"):
                num_in_engine[sample.labels["replica"]] += int(sample.value)
            elif sample.name == "pdserve_replica_sent" and sample.value:
                with_own.add(sample.labels["replica"])
            if sample.name in _HELD and sample.value:
                held.append(f"{sample.name} ({labels}): {sample.value:g}")
            elif sample.name in _ALL_MOVES:
                name = f"{sample.name} ({labels})" if labels else sample.name
                moves[name] = moves.get(name, 0.0) + sample.value
    return Scrape(
        num_live=num_live,
        held=tuple(held),
        moves=moves,
        num_moves=None if num_moves is None else round(num_moves),
        num_sent=int(num_sent),
        num_in_engine=num_in_engine,
        with_own=frozenset(with_own),
    )


def together(now: Sequence[Scrape], gone: Sequence[Scrape] = ()) -> Scrape | None:
    """What all routers say, or None if there is none.

    A replica is live if each knows it; of those that are gone only their moves count.
    """
    if not now:
        return None
    ever = [*now, *gone]
    counts = [look.num_moves for look in ever if look.num_moves is not None]
    moves: Counter[str] = Counter()
    for look in ever:
        moves.update(look.moves)
    return Scrape(
        num_live={pool: min(look.num_live[pool] for look in now) for pool in PHASES},
        held=tuple(dict.fromkeys(line for look in now for line in look.held)),
        moves=moves,
        num_moves=sum(counts) if counts else None,
        num_routers=len(now),
        num_sent=sum(look.num_sent for look in now),
        num_in_engine={
            replica: max(look.num_in_engine.get(replica, 0) for look in now)
            for replica in {each for look in now for each in look.num_in_engine}
        },
    )


async def scrape(port: int) -> Scrape | None:
    """Looks at the router that listens on `port`; None if it does not answer now."""
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            response = await client.get(f"http://127.0.0.1:{port}/metrics")
    except httpx.HTTPError:
        return None  # it is looked at again: what to make of a silence is the caller's to say
    return read_metrics(response.text) if response.status_code == 200 else None
