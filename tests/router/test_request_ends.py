"""Whatever a request holds and whatever goes wrong with it: it ends, and nobody else notices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from core_clusters import Cluster, fail, lose
from fake_replicas import add, decoded, end_of, prefilled, request, step
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from engine.wire import Kind, LoadReport, Rejection, StepOutputs
from router.pool import Replica
from router.recovery import Failures
from router.route_note import NOTE, RouteNote

BEYOND_64_BITS = 2**70
TWICE = Failures(num_ended=2, num_tokens=0, was_prefilling=False)
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
    add(cluster.core, unsendable("odd", **fields))
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("odd", FinishReason.ERROR)
    assert note.refusal is not None
    assert note.refusal.status == 400
    assert note.refusal.retry_after_s is None
    cluster.check_complete()
    add(cluster.core, request("next"))
    step(cluster.prefill[0], EngineCoreOutput("next", [1], finish_reason=FinishReason.STOP))
    cluster.check_complete()


async def test_an_id_that_cannot_be_sent_can_be_aborted() -> None:
    cluster = Cluster()
    add(cluster.core, request(HALF_A_LETTER))
    cluster.core.lifecycle.stop([HALF_A_LETTER], FinishReason.ABORT)
    cluster.check_complete()


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
        add(cluster.core, request(request_id))
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
        add(cluster.core, request(request_id))
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
    cluster.check_complete()


def breaks_when_it_waited(cluster: Cluster) -> None:
    lose(cluster.decode[0])
    add(cluster.core, request("odd"))
    _BreaksFor(cluster.prefill[0], "odd")
    cluster.decode = [cluster.join(cluster.core.decode, "new")]


def breaks_when_its_engine_was_stopped(cluster: Cluster) -> None:
    add(cluster.core, request("odd"))
    _BreaksFor(cluster.prefill[0], "odd")
    step(cluster.prefill[0], EngineCoreOutput("odd", [], finish_reason=FinishReason.ABORT))


def breaks_when_another_suspect_was_there(cluster: Cluster) -> None:
    add(cluster.core, request("odd")).suspected(TWICE)
    lose(cluster.prefill[0])
    (replica,) = cluster.decode
    (asked,) = end_of(replica).added()
    replica.rejected(Rejection(asked.request_id, "another suspect is here", has_suspect=True))
    _BreaksFor(replica, "odd")
    replica.step_received(StepOutputs([], LoadReport()))


@pytest.mark.parametrize(
    "breaks",
    [
        breaks_when_it_waited,
        breaks_when_its_engine_was_stopped,
        breaks_when_another_suspect_was_there,
    ],
)
async def test_whichever_step_goes_wrong_it_ends_and_leaves_nothing(
    breaks: Callable[[Cluster], None],
) -> None:
    cluster = Cluster()
    breaks(cluster)
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("odd", FinishReason.ERROR)
    cluster.check_complete()
