"""What has gone wrong with a replica: five things that must not be taken for each other. Pure.

They differ in what is known, so in what may be done: whether it is worth connecting again, whether
others are lost with it, and whether a request may have caused it. Only an engine that has ended or
does not answer counts against the requests that were in it, until their next tokens clear them; one
that does not answer while another hangs neither (`router.recovery`).
"""

import enum

from engine.exit_cause import EngineExit


class Fault(enum.Enum):
    """What has happened to a replica; the values are labels of metrics."""

    CONNECTION_LOST = "connection_lost"
    """The connection broke without a word: the network, or the replica's process."""
    REPLICA_SILENT = "replica_silent"
    """The connection stands, and nothing was heard for the stall timeout."""
    ENGINE_STALLED = "engine_stalled"
    """The replica says that its engine does not answer."""
    ENGINE_ENDED = "engine_ended"
    """The replica says how its engine ended."""
    NODE_GONE = "node_gone"
    """Ray says that its node is dead."""


FAILURES = {Fault.ENGINE_ENDED, Fault.ENGINE_STALLED}
"""Of engines: what a request may have caused."""
HANGS = {Fault.ENGINE_STALLED, Fault.REPLICA_SILENT}


def fault_of(
    *,
    engine_exit: EngineExit | None,
    is_node_dead: bool,
    is_silent: bool,
    leaves_because: str,
    is_unlisted: bool,
    closed_because: str | None,
) -> Fault | None:
    """The fault of a replica; None while it has none and where it has left in an orderly way.

    What the replica has said itself goes before what others say of it, and that before a guess.

    Args:
        engine_exit: how its engine ended, where it said so.
        is_node_dead: Ray says so of the replica's node.
        is_silent: nothing was heard of it for the stall timeout.
        leaves_because: what it last said of why it wants nothing new; see `LoadReport`.
        is_unlisted: Serve no longer lists it.
        closed_because: why the connection has ended; None while it has not.
    """
    if engine_exit is not None:
        return Fault.ENGINE_ENDED
    if leaves_because == "stalled":
        return Fault.ENGINE_STALLED
    if is_node_dead:
        return Fault.NODE_GONE
    if is_silent:
        return Fault.REPLICA_SILENT
    is_orderly = bool(leaves_because) or is_unlisted
    return None if is_orderly or closed_because is None else Fault.CONNECTION_LOST
