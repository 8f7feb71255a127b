"""What of the past has to be expected again. Pure."""

from bisect import bisect_right
from collections.abc import Sequence


def expected_again(
    came: Sequence[tuple[float, float]],
    forecasts: Sequence[tuple[float, float]],
    forecast: float,
    predicted: Sequence[float],
    *,
    now_s: float,
    ahead_s: float,
) -> tuple[float, ...]:
    """What to multiply each stretch of the past with, to replay it as it would come now.

    What was forecast, `ahead_s` before it came, can be started for when it is forecast again: of
    it comes as much as is forecast now. What was not would come unforeseen again, on top. So a pool
    follows a slow decline down, and keeps what bursts need that are shorter than a start. Nothing
    counts more than it was.

    Args:
        came: Seconds and load of each stretch, oldest first, up to `now_s`.
        forecasts: When each was made, and the load that it said.
        predicted: What a season known by now says of each stretch; 0 without one.
    """
    made_s = [each for each, _ in forecasts]
    parts = []
    end_s = now_s
    for (seconds, load), season in zip(reversed(came), reversed(predicted), strict=True):
        place = bisect_right(made_s, end_s - ahead_s) - 1
        then = max(season, forecasts[place][1] if place >= 0 else 0.0)
        again = min(load, forecast + max(0.0, load - then))
        parts.append(again / load if load > 0 else 1.0)
        end_s -= seconds
    return tuple(reversed(parts))
