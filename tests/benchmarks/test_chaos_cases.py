"""The cases: their names, their lengths, and stop strings that hit late."""

import json
from pathlib import Path

import pytest
import yaml

import benchmarks
from benchmarks.chaos_cases import MAX_MODEL_LEN, UNREAD, Case, base_cases, stop_case
from benchmarks.systems import SERVED_NAME
from cluster.config import parse_args

CASES = [*base_cases(), UNREAD]


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_one_right_answer_and_fits(case: Case) -> None:
    body = case.body(cache_salt="salt")

    assert body["temperature"] == 0 or "seed" in body
    assert body["cache_salt"] == "salt"
    assert "cache_salt" not in case.body()
    # At worst a token for each character; chat templates add a few.
    prompt = body.get("prompt") or json.dumps(body["messages"])
    assert len(prompt) + body["max_tokens"] <= MAX_MODEL_LEN
    json.dumps(body)


CASE = Case(name="one", path="completions", fields={"prompt": "a", "stream": True})


def test_stop_case() -> None:
    stopped = stop_case(CASE, "aaaaaaaaaaaaaaaabcdefgh")

    assert stopped.name == "one-stop"
    assert stopped.fields == {**CASE.fields, "stop": ["aaaab"]}


@pytest.mark.parametrize(
    "text",
    [pytest.param("ab" * 30, id="repeats itself"), pytest.param("�" * 30, id="no characters")],
)
def test_no_stop_string(text: str) -> None:
    with pytest.raises(ValueError, match="no stop string for one"):
        stop_case(CASE, text)


def test_the_config_takes_them() -> None:
    config = Path(benchmarks.__file__).parent / "configs" / "chaos.yaml"
    (application,) = yaml.safe_load(config.read_text())["applications"]
    args = parse_args(application["args"])

    assert args.public_name == SERVED_NAME
    assert args.engine["max_model_len"] == MAX_MODEL_LEN
    assert args.engine["dtype"] == "float32"
    assert args.prefill.replicas == args.decode.replicas == 2
