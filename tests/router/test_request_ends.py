"""Whatever a request holds and whatever goes wrong with it: it ends, and nobody else notices."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
from core_clusters import Cluster, fail
from fake_replicas import decoded, end_of, prefilled, request, step
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from engine.wire import Kind
from router.pool import Replica
from router.route_note import NOTE, RouteNote

BEYOND_64_BITS = 2**70
HALF_A_LETTER = "\ud800"


def unsendable(request_id: str, **fields: Any) -> EngineCoreRequest:
    each = request(request_id)
    for name, value in fields.items():
        setattr(each, name, value)
    return each


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"priority": BEYOND_64_BITS}, id="an-integer-beyond-64-bits"),
        pytest.param({"cache_salt": HALF_A_LETTER}, id="half-a-letter"),
        pytest.param({"prompt_token_ids": [BEYOND_64_BITS]}, id="a-token-beyond-64-bits"),
        pytest.param({"trace_headers": {"a": object()}}, id="an-object-of-no-known-type"),
    ],
)
async def test_what_no_message_can_carry_is_refused_and_leaves_nothing(
    fields: dict[str, Any],
) -> None:
    cluster = Cluster()
    note = RouteNote()
    NOTE.set(note)
    await cluster.core.add_request_async(unsendable("odd", **fields))
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("odd", FinishReason.ERROR)
    assert note.refusal is not None
    assert note.refusal.status == 400
    assert note.refusal.retry_after_s is None
    cluster.check_settled()
    await cluster.core.add_request_async(request("next"))
    step(cluster.prefill[0], EngineCoreOutput("next", [1], finish_reason=FinishReason.STOP))
    cluster.check_settled()


async def test_an_id_that_cannot_be_sent_can_be_aborted() -> None:
    cluster = Cluster()
    await cluster.core.add_request_async(request(HALF_A_LETTER))
    cluster.core.cancel([HALF_A_LETTER])
    cluster.check_settled()


@dataclass
class _BreaksFor:
    """A replica's `add` that fails for one request, as a bug of ours might."""

    replica: Replica
    request_id: str

    def __post_init__(self) -> None:
        end, self._send = end_of(self.replica), end_of(self.replica).send
        end.send = self  # type: ignore[method-assign]

    def __call__(self, kind: Kind, message: Any) -> None:
        if kind is Kind.ADD and message.request.request_id.startswith(self.request_id):
            raise RuntimeError("a bug")
        self._send(kind, message)


async def test_one_that_cannot_be_moved_does_not_keep_the_others() -> None:
    cluster = Cluster(num=2)
    for request_id in ("a", "x", "odd", "x2", "b"):
        await cluster.core.add_request_async(request(request_id))
    lost, other = cluster.prefill
    _BreaksFor(other, "odd")
    fail(lost)
    moved = [each.request_id for each in end_of(other).added() if "~" in each.request_id]
    assert moved == ["a~2", "b~2"]
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("odd", FinishReason.ERROR)


async def test_one_that_cannot_go_on_in_decode_does_not_keep_the_others_and_frees_its_blocks() -> (
    None
):
    cluster = Cluster()
    for request_id in ("a", "odd", "b"):
        await cluster.core.add_request_async(request(request_id))
    (p,), (d,) = cluster.prefill, cluster.decode
    _BreaksFor(d, "odd")
    step(p, *(prefilled(request_id=each) for each in ("a", "odd", "b")))
    assert [each.request_id for each in end_of(d).added()] == ["a", "b"]
    assert end_of(p).told(Kind.RELEASE) == ["odd"]
    assert [(each.request_id, each.finished) for each in cluster.outputs()] == [
        ("a", False),
        ("odd", True),
        ("b", False),
    ]
    step(d, decoded(1, ends=True, request_id="a"), decoded(1, ends=True, request_id="b"))
    cluster.check_settled()


async def test_the_front_end_forgets_one_whose_adding_was_broken_off() -> None:
    cluster = Cluster()
    odd: Any = request("odd")
    odd.sampling_params = None  # a pooling request: not served
    with pytest.raises(AssertionError):
        await cluster.core.add_request_async(odd)
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("odd", FinishReason.ABORT)
    cluster.check_settled()


async def test_an_answer_that_ends_by_a_stop_string_counts_as_one() -> None:
    """vLLM's front end finds the string and has the engine stop."""
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request(max_tokens=500))
    step(p, prefilled())
    for token in range(5):
        step(d, decoded(token))
    await cluster.core.abort_requests_async(["r"])
    assert end_of(d).told(Kind.ABORT) == ["r"]
    cluster.check_settled()
    ended = cluster.registry.get_sample_value
    assert ended("pdserve_requests_total", {"end": "stop"}) == 1
    report = cluster.core.scaling_report()
    assert (report["ended"], report["output_tokens"]) == (1, 6)


async def test_outputs_that_nobody_reads_are_noticed() -> None:
    cluster = Cluster()
    assert cluster.core.unread_s() == 0
    await cluster.core.add_request_async(request())
    step(cluster.prefill[0], prefilled())
    before_s = time.monotonic()
    while time.monotonic() == before_s:
        pass
    assert cluster.core.unread_s() > 0
    await cluster.core.get_output_async()
    assert cluster.core.unread_s() == 0
