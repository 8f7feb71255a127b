"""What a request is promised. Pure; router, scaling and simulator mean the same by it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Targets for the latency of one request."""

    ttft_s: float = 0.5
    itl_s: float = 0.05
