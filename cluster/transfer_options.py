"""Whether NIXL has the backends that a config names.

Owns the comparison; NIXL is asked only about others than the default.
"""

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.parsing import shown
from cluster.sections import TransferConfig


def check_backends(config: ClusterConfig) -> None:
    """Refuses backends that NIXL does not have, or that move no KV between engines.

    Raises:
        ConfigError: one line with the backends there are.
    """
    named = config.transfer.backends
    if named == TransferConfig().backends:
        return
    from kvtransfer.backends import engine_backends

    known = engine_backends()
    for name in named:
        if known is not None and name not in known:
            raise ConfigError(
                f"transfer.backends: {shown(repr(name))} is not one of {', '.join(known)}"
            )
