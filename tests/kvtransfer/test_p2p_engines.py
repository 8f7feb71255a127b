"""The point-to-point connector between two real engines: what the NIXL connector must do, it does.

The cases are NIXL's; here is the pair they run on, and what only this connector promises.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from kv_engines import running_engines
from test_kv_nixl import (  # noqa: F401
    EITHER_WAY,
    PAIRS,
    Pair,
    random_prompt,
    test_abort_while_decode_reads,
    test_decode_computes_what_it_cannot_read,
    test_decode_goes_on_from_prefills_first_token,
    test_decode_gone_before_the_pairs_first_handshake,
    test_decode_of_the_same_prompt_recomputes_its_last_token,
    test_decode_reads_only_the_blocks_it_lacks,
    test_idle_engines_use_no_core,
    test_prefill_that_stops_at_its_first_token_keeps_nothing,
    test_release_at_any_moment,
    test_release_ends_a_running_prefill,
    test_release_frees_what_waits_for_a_decode,
)

from engine.models import resolve_model
from kvtransfer.nixl import LEASE_ID

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    if request.param != PAIRS[0]:
        pytest.skip("this transport moves pages as they are, of whatever size, and in one way")
    model = resolve_model("demo")
    block_size, _ = request.param
    async with running_engines(
        model, "prefill", "decode", connector="nccl", block_size=block_size
    ) as engines:
        yield Pair(
            prefill=engines[0], decode=engines[1], block_size=block_size, copies_memory=False
        )


@EITHER_WAY
async def test_blocks_of_another_request_are_never_sent(pair: Pair) -> None:
    """A lease that is not the request's own, as of one that ended and came back: decode computes.

    Its blocks are then another prompt's, which would give other tokens.
    """
    prompt, other = random_prompt(300), random_prompt(301)
    expected = await pair.plain(prompt, 6)
    first = await pair.prefilled(prompt)
    held_now = await pair.prefilled(other)
    assert first.kv_transfer_params is not None
    assert held_now.kv_transfer_params is not None
    await pair.prefill.core.collective_rpc_async("release_kv_blocks", args=([first.request_id],))
    stale = held_now.kv_transfer_params | {
        LEASE_ID: first.kv_transfer_params[LEASE_ID],
        "remote_num_tokens": len(prompt),
    }

    before = pair.decode.num_bytes_read
    rest = await pair.decode.generate(prompt + first.token_ids, max_tokens=5, kv=stale)

    assert first.token_ids + rest.token_ids == expected
    assert pair.decode.num_bytes_read == before
    assert sum(delta.num_failures for delta in pair.decode.transfers) > 0
    await pair.prefill.core.collective_rpc_async("release_kv_blocks", args=([held_now.request_id],))
    await pair.holds_nothing()
