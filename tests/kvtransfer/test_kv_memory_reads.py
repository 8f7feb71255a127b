"""Reads that are copies: the right bytes, in as few copies as can be, or else by NIXL."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvtransfer.memory_reads import MemoryReads, merged
from kvtransfer.shared_memory import SharedMemory, share

BLOCK_BYTES = 64
NUM_BLOCKS = 8
LOCAL = "NIXL_INIT_AGENT"


class FakeAgent:
    """In NIXL's place: says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def prep_xfer_dlist(self, agent_name: str | bytes, rows: Any, memory_type: str) -> str:
        return f"list of {agent_name!r}"

    def release_dlist_handle(self, handle: str) -> None:
        self.asked.append(("release", handle))

    def make_prepped_xfer(self, *sides: Any) -> str:
        self.asked.append(sides)
        return "read"

    def check_xfer_state(self, handle: str) -> str:
        return f"state of {handle}"


class Sides:
    """A prefill's cache of numbered blocks, and a decode's empty one."""

    def __init__(self) -> None:
        self.theirs = torch.zeros(NUM_BLOCKS * BLOCK_BYTES, dtype=torch.uint8)
        self.memory: SharedMemory = share([self.theirs], "prefill")
        self.theirs.view(NUM_BLOCKS, BLOCK_BYTES)[:] = torch.arange(1, NUM_BLOCKS + 1)[:, None]
        self.ours = np.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.nixl = FakeAgent()
        self.agent = MemoryReads(self.nixl)

    def prepare(self) -> tuple[Any, Any]:
        return tuple(
            self.agent.prep_xfer_dlist(name, self.agent.get_xfer_descs(rows(address), "DRAM"))
            for name, address in (
                (LOCAL, self.ours.ctypes.data),
                (b"prefill", self.memory.address),
            )
        )  # type: ignore[return-value]

    def read(self, local_ids: list[int], remote_ids: list[int]) -> Any:
        local, remote = self.prepare()
        sides = (local, np.array(local_ids), remote, np.array(remote_ids))
        return self.agent.make_prepped_xfer("READ", *sides)

    def ended(self, read: Any) -> str:
        until_s = time.monotonic() + 10
        while (state := self.agent.check_xfer_state(read)) == "PROC":
            assert time.monotonic() < until_s
        return str(state)


def rows(address: int) -> Any:
    """Descriptors of all blocks."""
    found = np.zeros((NUM_BLOCKS, 3), dtype=np.uint64)
    found[:, 0] = address + np.arange(NUM_BLOCKS) * BLOCK_BYTES
    found[:, 1] = BLOCK_BYTES
    return found


def test_the_blocks_asked_for_are_copied_and_counted() -> None:
    sides = Sides()
    sides.agent.announce(sides.memory)
    read = sides.read([6, 0, 1], [2, 4, 5])
    sides.agent.transfer(read)
    assert sides.ended(read) == "DONE"
    telemetry = sides.agent.get_xfer_telemetry(read)
    assert (telemetry.totalBytes, telemetry.descCount) == (3 * BLOCK_BYTES, 2)
    assert telemetry.xferDuration > 0
    assert sides.ours[:, 0].tolist() == [5, 6, 0, 0, 0, 0, 3, 0]
    assert (sides.ours == sides.ours[:, :1]).all()
    sides.agent.release_xfer_handle(read)
    assert sides.nixl.asked == []


def test_descriptors_in_a_list_are_as_good() -> None:
    sides = Sides()
    assert sides.agent.get_xfer_descs([(1, 2, 0), (3, 4, 0)], "DRAM").rows.tolist() == [
        [1, 2, 0],
        [3, 4, 0],
    ]


def test_a_copy_that_was_given_up_writes_nothing_any_more() -> None:
    sides = Sides()
    sides.agent.announce(sides.memory)
    read = sides.read([0], [0])
    sides.agent.release_xfer_handle(read)
    sides.agent.transfer(read)
    assert sides.ended(read) == "ERR"
    assert not sides.ours.any()


@pytest.mark.parametrize(
    ("announced", "num_warnings"),
    [
        pytest.param(None, 0, id="not shared"),
        pytest.param({"boot_id": "another"}, 0, id="on another host"),
        pytest.param({"fd": 1_000_000}, 1, id="out of reach"),
        pytest.param({"address": 0}, 1, id="elsewhere"),
    ],
)
def test_nixl_reads_what_cannot_be_copied(
    announced: dict[str, Any] | None, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    sides = Sides()
    if announced is not None:
        sides.agent.announce(replace(sides.memory, **announced))
    read = sides.read([0], [3])
    asked = ("READ", f"list of {LOCAL!r}", [0], "list of b'prefill'", [3])
    assert sides.nixl.asked == [asked]
    assert sides.agent.check_xfer_state(read) == "state of read"
    assert len(caplog.records) == num_warnings


@pytest.mark.parametrize(
    ("to", "source", "expected"),
    [
        pytest.param([0, 64], [640, 704], [(0, 640, 128)], id="both go on"),
        pytest.param([64, 0], [704, 640], [(0, 640, 128)], id="in any order"),
        pytest.param([0, 64], [704, 640], [(0, 704, 64), (64, 640, 64)], id="source does not"),
        pytest.param([0, 128], [640, 704], [(0, 640, 64), (128, 704, 64)], id="target does not"),
        pytest.param([0, 64, 192], [0, 64, 128], [(0, 0, 128), (192, 128, 64)], id="some do"),
    ],
)
def test_copies_that_go_on_where_others_end_are_one(
    to: list[int], source: list[int], expected: list[tuple[int, int, int]]
) -> None:
    lengths = np.full(len(to), 64, dtype=np.uint64)
    found = merged(np.array(to, np.uint64), np.array(source, np.uint64), lengths)
    assert found == expected
