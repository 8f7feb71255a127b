"""The exceptions of this package.

KVTransferError
├── InternalsChanged   vLLM or NIXL lacks something that the connector is built on
├── PeerUnreachable    nobody answers on the side channel of another engine
├── PeerMismatch       somebody does, but this engine cannot read its KV
└── NotShareable       memory cannot be shared between the processes of a host
"""


class KVTransferError(Exception):
    """Any error of this package."""


class InternalsChanged(KVTransferError):
    """The installed vLLM or NIXL is not the one this package was written against."""


class PeerUnreachable(KVTransferError):
    """No engine answers at the address at which a peer should be."""


class PeerMismatch(KVTransferError):
    """The engine at a peer's address is another one, or keeps its KV in another way."""


class NotShareable(KVTransferError):
    """An engine's KV cannot be shared memory, or a peer cannot map it: NIXL reads it then."""
