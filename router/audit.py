"""Adds up what a router, its ledgers, the replicas and their engines hold, and names what does not
agree. Pure.

Nothing may be left of a request that has ended, anywhere. While requests run, messages are under
way: what a replica has can be compared with what the router knew when it asked and when it was
answered, as the channel keeps their order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from engine.wire import Holdings

MAX_NAMED = 5
"""Requests that one line names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterHoldings:
    """What one router has at one moment."""

    front_end: frozenset[str]
    """Ids of the requests that vLLM's front end waits for."""
    requests: frozenset[str]
    """Ids of those that the core client has."""
    placed: Mapping[str, frozenset[str]]
    """By replica, what the engines call the requests that the core client has there."""
    ledger: Mapping[str, frozenset[str]]
    """By replica, what the ledger has there; by the same names."""
    prefilling: Mapping[str, frozenset[str]]
    """By decode replica, whose prompts are counted as being prefilled there."""
    pending_first_tokens: frozenset[str]
    """Ids of those that are counted as having no token."""
    suspects: frozenset[str]
    """Ids of those in quarantine."""
    num_inflight: float
    """Sum of the gauge of requests in each phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found."""

    disagreements: tuple[str, ...]
    num_requests: int
    held: Mapping[str, Holdings] = field(default_factory=dict)
    """By replica, those that have answered."""


def audit(
    before: RouterHoldings, after: RouterHoldings, held: Mapping[str, Holdings | None]
) -> Audit:
    """Compares.

    Args:
        before: when the replicas were asked.
        after: when the last had answered.
        held: by replica, its answer; None where it has not come in time.
    """
    found = [*_in_router(before, after)]
    for replica_id, answer in held.items():
        if answer is None:
            found.append(f"{replica_id} does not answer")
        else:
            found += _in_replica(replica_id, before, after, answer)
    return Audit(
        disagreements=tuple(found),
        num_requests=len(after.requests),
        held={key: answer for key, answer in held.items() if answer is not None},
    )


def _in_router(before: RouterHoldings, after: RouterHoldings) -> Iterator[str]:
    # A request is in the front end a moment before the core client has it.
    both = before.front_end & after.front_end
    yield from _named("the front end waits for requests that nobody has", both - after.requests)
    yield from _named("nobody waits for requests", after.requests - after.front_end)
    for replica_id in after.placed.keys() | after.ledger.keys():
        placed = after.placed.get(replica_id, frozenset())
        ledger = after.ledger.get(replica_id, frozenset())
        yield from _named(f"the ledger of {replica_id} has ended requests", ledger - placed)
        yield from _named(f"the ledger of {replica_id} lacks requests", placed - ledger)
        prefilling = after.prefilling.get(replica_id, frozenset())
        yield from _named(f"{replica_id} is counted as prefilling", prefilling - placed)
    pending = after.pending_first_tokens - after.requests
    yield from _named("ended requests count as without a token", pending)
    yield from _named("ended requests are in quarantine", after.suspects - after.requests)
    if after.num_inflight != len(after.requests):
        yield f"pdserve_inflight says {after.num_inflight:g} requests, not {len(after.requests)}"


def _in_replica(
    replica_id: str, before: RouterHoldings, after: RouterHoldings, answer: Holdings
) -> Iterator[str]:
    asked = before.ledger.get(replica_id, frozenset())
    still = asked & after.ledger.get(replica_id, frozenset())
    has = frozenset(answer.request_ids)
    yield from _named(f"{replica_id} runs requests that this router has ended", has - asked)
    yield from _named(f"{replica_id} does not have requests", still - has)
    if answer.num_requests:
        return
    if answer.work_s > 1e-6:
        yield f"{replica_id} has no request and counts {answer.work_s:g} s of work"
    if answer.num_in_engine:
        yield f"{replica_id} has no request and its engine {answer.num_in_engine}"
    elif not answer.num_kept and answer.kv_usage_fraction:
        yield f"{replica_id} has no request and {answer.kv_usage_fraction:.2%} of its KV in use"


def _named(what: str, request_ids: frozenset[str]) -> Iterator[str]:
    if request_ids:
        names = ", ".join(sorted(request_ids)[:MAX_NAMED])
        more = f" and {len(request_ids) - MAX_NAMED} more" if len(request_ids) > MAX_NAMED else ""
        yield f"{what}: {names}{more}"
