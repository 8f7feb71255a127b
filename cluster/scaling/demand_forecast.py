"""What one pool has to reckon with: its demand when a start is over, and what of the past. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.scaling.forecast import Series, expect
from cluster.scaling.history import RECENT_S, Demand, latest, measure_demand, unshifted
from cluster.scaling.replay import expected_again
from cluster.scaling.season import Season, find_season
from cluster.scaling.snapshot import LearnedState, ScaleSettings, ScaleState, Traffic

TREND_STARTS = 1.5
"""Starts' times that a trend is followed ahead. What is asked for next is there later than what is
asked for now, and a rise that bends upwards leaves its line behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandForecast:
    now: Demand
    """That a replica started now will meet."""
    past: Demand
    """The look-back's mean."""
    loads: tuple[float, ...]
    """What of each bucket of the look-back is to be expected again."""
    likely_rate: float
    """That a pool that shrinks has to expect."""
    forecast: float
    """The load that is expected without a season, a start from now."""
    season: Season | None

    @property
    def season_input(self) -> tuple[tuple[str, float], ...]:
        return (("season_s", self.season.period_s),) if self.season else ()


def start_seconds(learned: LearnedState, settings: ScaleSettings) -> float:
    """How long a start takes: as seen, or as configured until one was seen."""
    return settings.expected_start_s if learned.start_s is None else learned.start_s


def forecast_demand(
    state: ScaleState,
    learned: LearnedState,
    series_of: Callable[[Sequence[Traffic]], Series],
    settings: ScaleSettings,
    *,
    now_s: float,
) -> DemandForecast:
    """What the pool has to reckon with whose load is `series_of` the traffic.

    A season says what comes next, and of what came that it was predicted, so that it need not be
    kept. Once more comes than it said, all is as if there was none: the past counts again, and the
    pool grows to it at once.
    """
    start_s = start_seconds(learned, settings)
    series = series_of(state.history)
    load = forecast = expect(series, TREND_STARTS * start_s)
    likely = measure_demand(latest(state.history, RECENT_S), output_tokens=None).rate
    predicted = (0.0,) * series.size
    like_now = unshifted(state.history)
    now = measure_demand(like_now, output_tokens=state.output_tokens)
    portion = _portion(series_of(like_now), now)
    season = find_season(series_of((*state.older, *state.history)), settings.look_back_s)
    if season is not None and season.is_surprised(series, start_s):
        season = None
    if season is not None:
        load = season.peak(start_s)
        predicted = season.predicted(series)
        # The delay that is not waited for is looked ahead: none goes that is soon needed again.
        likely = season.peak(start_s + settings.down_delay_s) / portion
    return DemandForecast(
        now=replace(now, rate=load / portion),
        past=measure_demand(state.history, output_tokens=state.output_tokens),
        loads=expected_again(
            series.loads, learned.forecasts, load, predicted, now_s=now_s, ahead_s=start_s
        ),
        likely_rate=likely,
        forecast=forecast,
        season=season,
    )


def _portion(series: Series, demand: Demand) -> float:
    """Load per request; 1 where there is none."""
    num = demand.rate * series.seconds[-1]
    return series.amounts[-1] / num if num and series.amounts[-1] else 1.0
