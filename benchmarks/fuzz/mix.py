"""What comes when: the run's requests by number, good ones among the others.

Owns the mix. Number k follows from the seed, the schema and k alone, so that one request can be
sent again without those before it.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.chaos_cases import Case
from benchmarks.fuzz.bodies import broken_shot, crowd_shot, edge_shot, mutated_shot, valid_shot
from benchmarks.fuzz.deadly import deadly_shot
from benchmarks.fuzz.framing_shots import client_shot, framing_shot
from benchmarks.fuzz.http_shots import header_shot, path_shot
from benchmarks.fuzz.port_shots import port_shot
from benchmarks.fuzz.schema import Api
from benchmarks.fuzz.shots import Kind, Shot

ROUND = 100
"""After so many the run looks whether anything is held."""
_GOOD = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What has a number: a good request, or a shot."""

    number: int
    what: Case | Shot


_WEIGHTS: Mapping[Kind, int] = {
    Kind.VALID: 14,
    Kind.EDGE: 24,
    Kind.MUTATED: 12,
    Kind.BROKEN: 8,
    Kind.DEADLY: 8,
    Kind.CROWD: 3,
    Kind.PATH: 8,
    Kind.HEADERS: 8,
    Kind.FRAMING: 6,
    Kind.CLIENT: 6,
    Kind.PORT: 8,
}
_MAKERS: Mapping[Kind, Callable[[random.Random, Api], Shot]] = {
    Kind.VALID: valid_shot,
    Kind.EDGE: edge_shot,
    Kind.MUTATED: mutated_shot,
    Kind.BROKEN: broken_shot,
    Kind.DEADLY: lambda rng, api: deadly_shot(rng),
    Kind.CROWD: crowd_shot,
    Kind.PATH: path_shot,
    Kind.HEADERS: lambda rng, api: header_shot(rng),
    Kind.FRAMING: lambda rng, api: framing_shot(rng),
    Kind.CLIENT: lambda rng, api: client_shot(rng),
    Kind.PORT: lambda rng, api: port_shot(rng),
}


class Mix:
    """The numbered requests of a seed, with shots of `kinds`."""

    def __init__(
        self, api: Api, cases: tuple[Case, ...], *, seed: int, kinds: tuple[Kind, ...] = tuple(Kind)
    ) -> None:
        self._api = api
        self._cases = cases
        self._seed = seed
        self._kinds = kinds
        self._weights = [_WEIGHTS[kind] for kind in kinds]

    def slot(self, number: int) -> Slot:
        """Number `number`, from 0 on."""
        rng = random.Random(f"{self._seed} {number}")
        if rng.random() < _GOOD:
            return Slot(number=number, what=rng.choice(self._cases))
        (kind,) = rng.choices(self._kinds, self._weights)
        return Slot(number=number, what=_MAKERS[kind](rng, self._api))
