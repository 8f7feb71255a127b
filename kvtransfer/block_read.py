"""One request's blocks on their way from prefill to decode, from the first read to the verdict.

Owns the record. Never posts a read.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from kvtransfer.leases import LeaseRead


class Verdict(Enum):
    """What is known of blocks that were read."""

    VALID = auto()
    ENDED = auto()
    UNREADABLE = auto()
    OPEN = auto()


@dataclass(slots=True, kw_only=True)
class BlockRead:
    """A request that is being read. Owned by the worker that reads."""

    lease_id: int | None
    """None where prefill named none: such blocks are never valid."""
    remote_block_ids: Any
    """As prefill named them; upstream overwrites its own copy with each attempt."""
    retried: bool = False

    # Of this attempt.
    given_up: bool = False
    """Its peer was gone: it is cancelled, until nothing of it is under way."""
    remote_ranks: set[int] = field(default_factory=set)
    """The prefill workers from which blocks were read."""
    lease_reads: list[LeaseRead] = field(default_factory=list)

    def begin_again(self) -> None:
        """The second and last attempt. The reads of the first were released."""
        self.retried = True
        self.given_up = False
        self.remote_ranks = set()
        self.lease_reads = []
