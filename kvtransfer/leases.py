"""Leases: how a decode knows that the blocks it has read were still the request's own.

A prefill worker keeps a table of numbers that its peers can read. While a request's blocks are
kept for a decode, the request's lease id stands in the table; before the blocks can be given to
another request, a zero does. A decode that has read the blocks then reads the table: where it finds
the lease id, the blocks were valid until after the last of them was read. No clock takes part.

Owns the table and the reading of one. Never decides when a lease ends.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

NUM_SLOTS = 65_536
"""Leases of one engine at the same time. Were there more, the older of two would count as ended."""

_NUM_LANDINGS = 4_096
_ENTRY_BYTES = np.dtype(np.int64).itemsize
_NO_LEASE = 0
_HOST_DEVICE = 0


class LeaseTable:
    """The leases that a prefill worker has granted. Owns memory that peers read."""

    def __init__(self) -> None:
        self._slots = np.zeros(NUM_SLOTS, dtype=np.int64)

    @property
    def address(self) -> int:
        return int(self._slots.ctypes.data)

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def regions(self) -> list[tuple[int, int, int, str]]:
        """For NIXL's registration."""
        return [(self.address, self._slots.nbytes, _HOST_DEVICE, "")]

    def grant(self, lease_id: int) -> None:
        """`lease_id` is positive and was never granted before."""
        self._slots[lease_id % NUM_SLOTS] = lease_id

    def end(self, lease_id: int) -> None:
        """From when this returns, nobody can take the lease for valid."""
        slot = lease_id % NUM_SLOTS
        if self._slots[slot] == lease_id:
            self._slots[slot] = _NO_LEASE


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTable:
    """Where the table of a peer's worker is."""

    agent_name: str
    address: int
    num_slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRead:
    """A read of one entry of a peer's table, under way."""

    transfer: Any
    landing: int


class LeaseReader:
    """Reads entries of peers' tables. Owns the memory that they are read into.

    Raises what NIXL raises where a peer cannot be read.
    """

    def __init__(self) -> None:
        self._landings = np.zeros(_NUM_LANDINGS, dtype=np.int64)
        self._free = list(range(_NUM_LANDINGS))

    @property
    def regions(self) -> list[tuple[int, int, int, str]]:
        """For NIXL's registration."""
        return [(int(self._landings.ctypes.data), self._landings.nbytes, _HOST_DEVICE, "")]

    def post(self, agent: Any, tables: Sequence[RemoteTable], lease_id: int) -> list[LeaseRead]:
        """Begins to read what the tables say of a lease; nothing where no memory is left for it."""
        if len(self._free) < len(tables):
            return []
        reads: list[LeaseRead] = []
        try:
            for table in tables:
                reads.append(self._post_one(agent, table, lease_id))
        except Exception:
            self.release(agent, reads)
            raise
        return reads

    def entry(self, agent: Any, read: LeaseRead) -> int | None:
        """What the table said, once it is read. Raises ConnectionError where it cannot be."""
        state = agent.check_xfer_state(read.transfer)
        if state == "PROC":
            return None
        if state != "DONE":
            raise ConnectionError(f"the read of a lease ended as {state}")
        return int(self._landings[read.landing])

    def release(self, agent: Any, reads: Sequence[LeaseRead]) -> None:
        """Ends these reads, done or not."""
        for read in reads:
            try:
                agent.release_xfer_handle(read.transfer)
            except Exception:
                # It may still be written to: eight bytes that nobody uses again.
                logger.exception("A read of a lease could not be cancelled.")
            else:
                self._free.append(read.landing)

    def _post_one(self, agent: Any, table: RemoteTable, lease_id: int) -> LeaseRead:
        landing = self._free.pop()
        self._landings[landing] = _NO_LEASE
        here = int(self._landings.ctypes.data) + landing * _ENTRY_BYTES
        there = table.address + lease_id % table.num_slots * _ENTRY_BYTES
        try:
            transfer = agent.initialize_xfer(
                "READ",
                agent.get_xfer_descs([(here, _ENTRY_BYTES, _HOST_DEVICE)], "DRAM"),
                agent.get_xfer_descs([(there, _ENTRY_BYTES, _HOST_DEVICE)], "DRAM"),
                table.agent_name,
            )
        except Exception:
            self._free.append(landing)
            raise
        read = LeaseRead(transfer=transfer, landing=landing)
        try:
            agent.transfer(transfer)
        except Exception:
            self.release(agent, [read])
            raise
        return read
