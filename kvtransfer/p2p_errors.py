"""The exceptions of the point-to-point transport.

KVTransferError
└── PairError            one prefill/decode pair; every other pair goes on
    ├── PairBroken       its connection or its process group ended or failed: the pair is closed
    │   └── PairTimeout  nothing came in time: the peer may hang, so it is not asked again
    ├── PairStuck        a device does not end what was queued: blocks may still be used
    ├── PairMismatch     the two engines lay their KV out differently
    └── FetchRefused     prefill no longer holds what was asked for; the pair goes on
"""

from kvtransfer.errors import KVTransferError


class PairError(KVTransferError):
    """An error of one prefill/decode pair."""


class PairBroken(PairError):
    """The connection or the process group of a pair ended or failed."""


class PairTimeout(PairBroken):
    """The peer let the pair's timeout pass."""


class PairStuck(PairError):
    """A group cannot be ended: blocks may still be read or written."""


class PairMismatch(PairError):
    """The KV layouts of a pair differ; the text names the fields."""


class FetchRefused(PairError):
    """Prefill does not hold the request that was asked for under that lease."""
