"""What is sent follows from the seed, and is what it says it is."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import httptools
import pytest

from benchmarks.chaos_cases import Case
from benchmarks.fuzz.bodies import COMPLETIONS
from benchmarks.fuzz.good import CASES
from benchmarks.fuzz.mix import Mix
from benchmarks.fuzz.schema import Api
from benchmarks.fuzz.shots import Kind, Shot

NUM = 1_500
DOCUMENT: dict[str, Any] = {
    "paths": {
        COMPLETIONS: {
            "post": {
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/x/Completion"}}}
                }
            }
        },
        "/v1/models": {"get": {}},
        "/v1/responses/{response_id}": {"get": {}},
    },
    "components": {
        "schemas": {
            "Completion": {
                "type": "object",
                "properties": {
                    "prompt": {"type": "string"},
                    "n": {"type": "integer"},
                    "temperature": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                    "stop": {"type": "array", "items": {"type": "string"}},
                },
            }
        }
    },
}


def new_mix(seed: int = 0, kinds: tuple[Kind, ...] = tuple(Kind)) -> Mix:
    return Mix(Api(DOCUMENT), CASES, seed=seed, kinds=kinds)


@pytest.fixture(scope="module")
def slots() -> list[Case | Shot]:
    mix = new_mix()
    return [mix.slot(number).what for number in range(NUM)]


def shots_of(slots: list[Case | Shot], *kinds: Kind) -> Iterator[Shot]:
    return (what for what in slots if isinstance(what, Shot) and what.kind in kinds)


class Read:
    """A request as a server reads it."""

    def __init__(self, data: bytes) -> None:
        self.body = b""
        self.is_whole = False
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(data)
        self.method = parser.get_method()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_whole = True


def data_of(shot: Shot) -> bytes:
    return b"".join(part.data for part in shot.parts)


def test_a_number_is_the_same_again_and_alone(slots: list[Case | Shot]) -> None:
    again = new_mix()
    assert all(again.slot(number).what == slots[number] for number in reversed(range(0, NUM, 7)))


def test_another_seed_is_another_sequence(slots: list[Case | Shot]) -> None:
    other = new_mix(seed=1)
    assert [other.slot(number).what for number in range(100)] != slots[:100]


def test_every_kind_and_every_case_comes(slots: list[Case | Shot]) -> None:
    assert {what.kind for what in slots if isinstance(what, Shot)} == set(Kind)
    assert {what.name for what in slots if isinstance(what, Case)} == {case.name for case in CASES}


def test_only_the_kinds_that_are_asked_for() -> None:
    mix = new_mix(kinds=(Kind.PORT, Kind.HEADERS))
    slots = [mix.slot(number).what for number in range(200)]
    kinds = {what.kind for what in slots if isinstance(what, Shot)}
    assert kinds == {Kind.PORT, Kind.HEADERS}


BODIES = (Kind.VALID, Kind.EDGE, Kind.MUTATED, Kind.DEADLY, Kind.CROWD)


def test_requests_with_a_body_are_whole_and_json(slots: list[Case | Shot]) -> None:
    digits, depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
    seen = 0
    try:
        sys.set_int_max_str_digits(0)
        for shot in shots_of(slots, *BODIES):
            read = Read(data_of(shot))
            assert (read.method, read.is_whole, shot.is_request) == (b"POST", True, True)
            if read.body.count(b"[") + read.body.count(b"{") < 400:
                json.loads(read.body)
                seen += 1
    finally:
        sys.set_int_max_str_digits(digits)
    assert seen > 500
    assert sys.getrecursionlimit() == depth


@pytest.mark.parametrize("kind", [Kind.PATH, Kind.HEADERS, Kind.BROKEN])
def test_what_calls_itself_a_request_is_one(slots: list[Case | Shot], kind: Kind) -> None:
    # A method that HTTP does not know is well-formed too, but not to this parser.
    shots = [shot for shot in shots_of(slots, kind) if not shot.name.startswith("FOO ")]
    requests = [shot for shot in shots if shot.is_request]
    assert requests
    for shot in requests:
        assert Read(data_of(shot)).is_whole, shot.name


def test_edges_name_the_field_and_come_for_each(slots: list[Case | Shot]) -> None:
    names = " ".join(shot.name for shot in shots_of(slots, Kind.EDGE))
    assert all(f": {field} is " in names for field in ("prompt", "n", "temperature", "stop"))


def test_some_bytes_are_for_other_ports(slots: list[Case | Shot]) -> None:
    assert all(
        (shot.port is not None) == (shot.kind is Kind.PORT) for shot in shots_of(slots, *Kind)
    )


def test_a_shot_in_a_file_is_whole(slots: list[Case | Shot]) -> None:
    for shot in shots_of(slots, Kind.CLIENT, Kind.FRAMING):
        written = json.loads(json.dumps(shot.as_json()))
        assert len(written["parts"]) == len(shot.parts)
        assert len(shot.shown()) < 1_000
