"""The report on two engines that take turns, and what each of them is asked."""

import json
import random

from benchmarks.measure import LONG_PROMPT, SHORT_PROMPT
from benchmarks.two_engines import Round, bodies, report


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    taken = [
        Round(one_server_s=0.004, two_servers_s=0.006),
        Round(one_server_s=0.005, two_servers_s=0.006),
        Round(one_server_s=0.010, two_servers_s=0.014),
    ]
    lines = report({SHORT_PROMPT: taken, LONG_PROMPT: taken[:1] * 3}).splitlines()
    assert "| 20 tokens | 5.0 (4.0 to 10.0) | 6.0 (6.0 to 14.0) | 1.40 |" in lines
    assert "| 500 tokens | 4.0 (4.0 to 4.0) | 6.0 (6.0 to 6.0) | 1.50 |" in lines


def test_the_server_that_reads_writes_one_token() -> None:
    asked = [json.loads(each) for each in bodies(SHORT_PROMPT, random.Random(1), output_tokens=1)]
    assert {each["max_tokens"] for each in asked} == {1}
    assert {len(each["prompt"]) for each in asked} == {SHORT_PROMPT.prompt_tokens}
    whole = [json.loads(each) for each in bodies(SHORT_PROMPT, random.Random(1))]
    assert {each["max_tokens"] for each in whole} == {SHORT_PROMPT.output_tokens}
