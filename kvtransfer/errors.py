"""The exceptions of this package.

KVTransferError
├── InternalsChanged   vLLM or NIXL lacks something that the connector is built on
├── PeerUnreachable    nobody answers on the side channel of another engine
│   └── PeerTimeout    not in time: it may hang
├── PeerMismatch       somebody does, but this engine cannot read its KV
├── GreetingFailed     who has connected, or was connected to, is not let go on
├── SecretMissing      an engine was given no secret by which it could know its peers
└── NotShareable       memory cannot be shared between the processes of a host
"""


class KVTransferError(Exception):
    """Any error of this package."""


class InternalsChanged(KVTransferError):
    """The installed vLLM or NIXL is not the one this package was written against."""


class PeerUnreachable(KVTransferError):
    """No engine answers at the address at which a peer should be."""


class PeerTimeout(PeerUnreachable):
    """Somebody listens at the address, and does not answer in time."""


class PeerMismatch(KVTransferError):
    """The engine at a peer's address is another one, or keeps its KV in another way."""


class GreetingFailed(KVTransferError):
    """Who has connected, or was connected to, is no member, or not the one that is wanted."""

    def __init__(self, reason: str, farewell: bytes = b"") -> None:
        super().__init__(reason)
        self.farewell = farewell
        """What tells the other side, if there is anything to tell."""


class SecretMissing(KVTransferError):
    """An engine was started without its application's secret, and cannot know its peers."""


class NotShareable(KVTransferError):
    """An engine's KV cannot be shared memory, or a peer cannot map it: NIXL reads it then."""
