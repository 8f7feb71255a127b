"""What happens to a prefill engine while decode reads from it, whichever connector they have.

Decode's answers must be right, and others' must not wait. Owns no engine.
"""

import asyncio
import os
import signal

from kv_engines import PREFILL_ONLY, Engine, handed_over, plain, random_prompt


async def hands_over(prefill: Engine, decode: Engine, seed: str) -> None:
    """Nothing: decode gets every block of a prompt."""
    prompt = random_prompt(300, seed)
    expected = await plain(decode, prompt, 6)
    assert await handed_over(prefill, decode, prompt) == expected


async def dies_while_it_is_read(prefill: Engine, decode: Engine) -> None:
    """At whatever moment: its blocks are whole, or they are computed."""
    prompts = [random_prompt(4000, f"dies {number}") for number in range(3)]
    expected = [await plain(decode, prompt, 6) for prompt in prompts]
    firsts = [await prefill.generate(prompt, kv=dict(PREFILL_ONLY)) for prompt in prompts]
    rests = [
        await decode.start(prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params)
        for prompt, first in zip(prompts, firsts, strict=True)
    ]
    await prefill.kill()
    for rest in rests:
        await asyncio.wait_for(rest.ended.wait(), 30)
    answers = [a.token_ids + b.token_ids for a, b in zip(firsts, rests, strict=True)]
    assert answers == expected


async def hangs_while_it_is_read(prefill: Engine, decode: Engine) -> tuple[list[int], list[int]]:
    """Until decode has computed the answer itself; another does not wait. Prompt and answer."""
    prompt, other = random_prompt(1000, "hangs"), random_prompt(200, "other")
    expected, other_expected = await plain(decode, prompt, 6), await plain(decode, other, 6)
    first = await prefill.generate(prompt, kv=dict(PREFILL_ONLY))
    os.kill(prefill.pid, signal.SIGSTOP)
    try:
        late = await decode.start(
            prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
        )
        bystander = await decode.generate(other, max_tokens=6)
        assert bystander.token_ids == other_expected
        assert not late.ended.is_set()
        await asyncio.wait_for(late.ended.wait(), 60)
    finally:
        os.kill(prefill.pid, signal.SIGCONT)
    assert first.token_ids + late.token_ids == expected
    return prompt, expected
