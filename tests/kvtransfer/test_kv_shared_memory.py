"""A KV cache in memory that a peer maps: what moves there, who may map it, how long it lasts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kvtransfer.errors import NotShareable
from kvtransfer.shared_memory import SharedMemory, map_shared, share

NUM_BYTES = 1 << 20

OWNER = """
import sys, msgspec, torch
from kvtransfer.shared_memory import share
cache = torch.zeros(4096, dtype=torch.int8)
memory = share([cache], "owner")
cache[7] = 42
sys.stdout.write(msgspec.json.encode(memory).decode() + "\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def layer_views() -> list[torch.Tensor]:
    """As vLLM makes them: of one buffer that only they keep."""
    buffer = torch.zeros(NUM_BYTES, dtype=torch.int8)
    return [
        torch.as_strided(buffer.view(torch.float32), (8, 4, 16), (256, 16, 1), offset)
        for offset in (0, 64, 128)
    ]


def test_every_view_shows_the_memory_that_a_peer_maps() -> None:
    views = layer_views()
    shapes = [(view.shape, view.stride(), view.storage_offset()) for view in views]
    memory = share(views, "agent")
    for number, view in enumerate(views):
        view[3, 2, 1] = number + 1
    mapped = map_shared(memory).view(np.float32)
    assert [(view.shape, view.stride(), view.storage_offset()) for view in views] == shapes
    places = [offset + 3 * 256 + 2 * 16 + 1 for offset in (0, 64, 128)]
    assert mapped[places].tolist() == [1.0, 2.0, 3.0]
    assert np.count_nonzero(mapped) == 3
    assert (memory.num_bytes, memory.agent_name) == (NUM_BYTES, "agent")
    assert memory.address == views[0].untyped_storage().data_ptr()


def test_a_peer_cannot_write() -> None:
    views = layer_views()
    mapped = map_shared(share(views, "agent"))
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def test_a_view_that_was_not_named_keeps_everything_where_it_is() -> None:
    buffer = torch.zeros(64, dtype=torch.int8)
    unnamed = buffer[:]
    address = buffer.data_ptr()
    with pytest.raises(NotShareable, match="something beside"):
        share([buffer], "agent")
    buffer[5] = 3
    assert (buffer.data_ptr(), int(unnamed[5])) == (address, 3)


def test_two_allocations_are_not_shared() -> None:
    with pytest.raises(NotShareable, match="2 allocations"):
        share([torch.zeros(8), torch.zeros(8)], "agent")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"name": "another"}, "another one"),
        ({"num_bytes": NUM_BYTES + 1}, "another one"),
        ({"fd": 1_000_000}, "No such file"),
    ],
    ids=str,
)
def test_memory_that_is_not_the_peers_is_not_mapped(other: dict[str, Any], reason: str) -> None:
    views = layer_views()
    memory = share(views, "agent")
    with pytest.raises(NotShareable, match=reason):
        map_shared(replace(memory, **other))


def test_what_is_mapped_outlives_its_owner() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with owner:
        assert owner.stdout is not None
        memory = msgspec.json.decode(owner.stdout.readline(), type=SharedMemory)
        mapped = map_shared(memory)
        owner.kill()
    assert mapped[7] == 42
    with pytest.raises(NotShareable):
        map_shared(memory)
