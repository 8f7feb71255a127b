"""The phases of a request's life, and how it ends. Metrics, spans and the simulator use the same
names.
"""

import enum


class RequestPhase(enum.Enum):
    """Where a request is. Metrics and spans use these names."""

    RECEIVED = "received"
    WAITING = "waiting"
    """For a pool that has no live replica."""
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    ENDED = "ended"


COMPLETE = ("stop", "length", "repetition")
"""How complete responses end."""
