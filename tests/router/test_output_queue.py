"""What engines have computed waits for vLLM's front end."""

import time

from fake_replicas import decoded

from router.output_queue import OutputQueue


async def test_outputs_name_the_weights_as_an_engine_does() -> None:
    queue = OutputQueue()
    queue.put([])
    queue.put([decoded(7), decoded(8)])
    batch = await queue.get()
    assert batch.weight_version == "default"
    assert [each.new_token_ids for each in batch.outputs] == [[7], [8]]


async def test_outputs_that_nobody_reads_are_noticed() -> None:
    queue = OutputQueue()
    assert queue.unread_s() == 0
    queue.put([decoded(7)])
    before_s = time.monotonic()
    while time.monotonic() == before_s:
        pass
    assert queue.unread_s() > 0
    await queue.get()
    assert queue.unread_s() == 0
