"""The errors of the engine package.

EngineError
├── ChannelError            the channel between a router and a replica
│   ├── ChannelClosed       the other side went away, or this side closed
│   └── ProtocolError       the other side sent what the protocol does not allow
├── EngineEnded             the engine core's process has ended
├── EngineUnusable          the engine has started and does not answer as it should
├── ModelUnavailable        a built-in model cannot be had on this machine
│   └── IndexUnreachable    pip reaches no package index
├── EngineStalled           the engine core does not answer, though its process is alive
├── ReplicaClosed           the replica has cut off its routers for good
├── ReplicaLeaves           the replica was asked to end and takes nothing new
└── EngineInternalsChanged  vLLM or Ray is not the version whose internals we call
"""

from engine.exit_cause import EngineExit


class EngineError(Exception):
    """Any error of this package."""


class ChannelError(EngineError):
    """The channel cannot be used."""


class ChannelClosed(ChannelError):
    """The connection has ended; what was in flight on it will not be answered."""


class ProtocolError(ChannelError):
    """A frame that the protocol does not allow: the connection is closed."""


class EngineEnded(EngineError):
    """The engine core has ended; `exit` says how."""

    def __init__(self, how: EngineExit) -> None:
        super().__init__(how)
        self.exit = how

    def __str__(self) -> str:
        return self.exit.text


class EngineUnusable(EngineError):
    """The engine has started, and its first answer is not what was asked for."""


class ModelUnavailable(EngineError):
    """A built-in model cannot be made here; the text is one line that says what to do."""


class IndexUnreachable(ModelUnavailable):
    """No network, or not to where packages are."""


class EngineStalled(EngineError):
    """The engine core did not answer within its time limit."""


class ReplicaClosed(EngineError):
    """The replica was found unhealthy once and serves nobody since: it must be replaced."""


class ReplicaLeaves(EngineError):
    """The replica was asked to end: it finishes what it has, and another should take its place."""

    def __init__(self) -> None:
        super().__init__("the replica was asked to end and drains: start another in its place")


class EngineInternalsChanged(EngineError):
    """A name inside vLLM or Ray that this package relies on is missing."""
