"""The exceptions of this package.

KVTransferError
└── InternalsChanged   vLLM or NIXL lacks something that the connector is built on
"""


class KVTransferError(Exception):
    """Any error of this package."""


class InternalsChanged(KVTransferError):
    """The installed vLLM or NIXL is not the one this package was written against."""
