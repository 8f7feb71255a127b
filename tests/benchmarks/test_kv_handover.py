"""The handover benchmark, small, with a real pair of engines."""

from typing import get_args

import pytest

from benchmarks.kv_handover import Handover, measure
from kvtransfer.config import Sharing

MIB = 1 << 20


def test_the_ratio_is_that_of_the_bandwidths() -> None:
    handover = Handover(
        num_bytes=64 * MIB, num_descriptors=512, usable_s=0.02, read_s=0.012, vm_read_s=0.009
    )
    assert handover.ratio == pytest.approx(0.45)


@pytest.mark.parametrize("shared_memory", get_args(Sharing))
async def test_a_pair_hands_over_every_block(shared_memory: Sharing) -> None:
    (handover,) = await measure(num_rounds=1, num_mib=8, shared_memory=shared_memory)
    assert handover.num_bytes == 8 * MIB
    assert 8 * MIB % handover.num_descriptors == 0
    assert 0 < handover.read_s < handover.usable_s
    assert handover.vm_read_s > 0
