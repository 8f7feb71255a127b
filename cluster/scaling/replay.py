"""What of the past has to be expected again. Pure."""

from bisect import bisect_right
from collections.abc import Sequence

from cluster.scaling.snapshot import Traffic


def past_loads(
    history: Sequence[Traffic],
    forecasts: Sequence[tuple[float, float]],
    forecast: float,
    *,
    now_s: float,
    ahead_s: float,
) -> tuple[float, ...]:
    """What to multiply each bucket of `history` with, to replay it as it would come now.

    A load that was forecast, `ahead_s` before it came, can be started for when it is forecast
    again: of it counts as much as today's `forecast` is of that day's. A load that came unforeseen
    would come so again, and counts in full. So a pool follows a slow decline down, and keeps what
    bursts need that are shorter than a start. Nothing counts more than it was.

    Args:
        history: Oldest first, up to `now_s`.
        forecasts: When each was made, and the load that it said.
    """
    made_s = [each for each, _ in forecasts]
    loads = []
    end_s = now_s
    for bucket in reversed(history):
        place = bisect_right(made_s, end_s - ahead_s) - 1
        then = forecasts[place][1] if place >= 0 else 0.0
        loads.append(min(1.0, forecast / then) if then > 0 else 1.0)
        end_s -= bucket.duration_s
    return tuple(reversed(loads))
