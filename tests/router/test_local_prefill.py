"""Whether decode reads a prompt itself, and in which steps."""

import pytest

from router.local_prefill import KV_SHARE, STEP_SHARE, DecodeReader, plan_local_prefill

ITL_S, TTFT_S = 0.05, 1.0


def reader(
    *,
    answers_s: float = 0.01,
    reading_s: float = 0.0,
    request_s: float = 0.01,
    kv_usage_fraction: float = 0.05,
    has_room: bool = True,
    is_cached: bool = False,
) -> DecodeReader:
    return DecodeReader(
        base_s=0.005,
        answers_s=answers_s,
        reading_s=reading_s,
        request_s=request_s,
        kv_usage_fraction=kv_usage_fraction,
        has_room=has_room,
        is_cached=is_cached,
    )


@pytest.mark.parametrize(
    ("of", "prefill_s", "reason"),
    [
        pytest.param(reader(), 0.03, "short_prompt", id="sooner-than-prefill-and-handover"),
        pytest.param(reader(is_cached=True), 0.03, "cached_in_decode", id="cached"),
        pytest.param(reader(), 0.02, None, id="prefill-is-sooner"),
        pytest.param(reader(reading_s=0.04), 0.5, None, id="others-would-wait-too-long"),
        pytest.param(reader(reading_s=0.03), 0.5, "short_prompt", id="others-wait-just-so-long"),
        pytest.param(reader(has_room=False), 9.0, None, id="decode-is-full"),
        pytest.param(reader(kv_usage_fraction=0.5), 0.03, None, id="slower-steps-fill-the-kv"),
        pytest.param(reader(request_s=0.2), 0.5, None, id="long-and-prefill-is-in-time"),
        pytest.param(reader(request_s=0.2), 1.5, "prefill_saturated", id="long-and-prefill-late"),
        pytest.param(reader(request_s=0.9), 1.5, None, id="decode-is-late-too"),
        pytest.param(reader(answers_s=0.04, request_s=0.2), 9.0, None, id="no-time-to-spare"),
        pytest.param(reader(request_s=0.2, kv_usage_fraction=0.25), 9.0, None, id="no-kv-to-spare"),
    ],
)
def test_decode_reads_a_prompt_itself(
    of: DecodeReader, prefill_s: float, reason: str | None
) -> None:
    plan = plan_local_prefill(of, prefill_s=prefill_s, handover_s=0.01, ttft_s=TTFT_S, itl_s=ITL_S)
    assert (plan and plan.reason) == reason


def test_pieces_leave_the_answers_their_time() -> None:
    """Of steps of 35 ms, 15 are for answers: 0.2 s of prompts take 0.35 s."""
    of = reader(reading_s=0.1, request_s=0.1)
    plan = plan_local_prefill(of, prefill_s=9.0, handover_s=0.01, ttft_s=TTFT_S, itl_s=ITL_S)
    assert plan is not None
    assert plan.step_limit_s == STEP_SHARE * ITL_S == pytest.approx(0.035)
    assert plan.ttft_s == pytest.approx(of.step_s + 0.35)


def test_a_prompt_that_decode_has_to_read_takes_longer_in_pieces() -> None:
    of, limit_s = reader(request_s=0.2), STEP_SHARE * ITL_S
    assert of.ttft_s(None) == of.one_step_ttft_s
    assert of.ttft_s(limit_s) == pytest.approx(of.step_s + 0.35)
    short, busy = reader(), reader(answers_s=0.1)
    assert short.ttft_s(limit_s) == short.one_step_ttft_s
    assert busy.ttft_s(limit_s) == busy.one_step_ttft_s


def test_kv_is_counted_as_it_will_be_once_steps_are_slower() -> None:
    of = reader(kv_usage_fraction=KV_SHARE / 2)
    assert of.can_slow_to(2 * of.step_s)
    assert not of.can_slow_to(2.1 * of.step_s)
