"""The order in which prompts wait for prefill: least slack to their deadline first. Pure.

A prompt's slack is what is left until it must start. It shrinks by one second a second for all that
wait, so their order never changes, and a number fixed at arrival says it: the latest start. It also
means that nothing starves: whatever comes later than a prompt's deadline queues behind it. Engines
demote a prompt that has missed its latest start for a while (`engine.lateness`).
"""

STRETCH = 4.0
"""A prompt may take this many times its own prefill. Without it, one that is longer than the target
allows would be late at arrival, and so the first, before all that can still be in time."""

CLIENT_STEP_S = 1.0
"""What one step of a request's own `priority` is worth; as in vLLM, lower comes first."""


def latest_start_ms(
    *, arrival_s: float, prefill_s: float, ttft_s: float, client_priority: int = 0
) -> int:
    """When a prompt must start at the latest; engines take the lowest first.

    Args:
        arrival_s: on a clock that all routers share.
        prefill_s: its predicted prefill.
        ttft_s: the target.
    """
    deadline_s = arrival_s + max(ttft_s, STRETCH * prefill_s)
    return round(1000 * (deadline_s - prefill_s + CLIENT_STEP_S * client_priority))


def deadline_s(latest_start_ms: int, *, prefill_s: float) -> float:
    """When a prompt that starts at the latest is prefilled, on the same clock. From then on it
    gives way to others (`router.ledger`)."""
    return latest_start_ms / 1000 + prefill_s
