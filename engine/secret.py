"""The secret that a Serve application's routers and replicas share.

Lives in the Ray cluster's own key-value store, written once by whoever needs it first: it is in no
config, no argument and no dashboard, and a redeployment does not change it.
"""

import secrets

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

_NAMESPACE = "pdserve"


def application_secret(application: str) -> str:
    """The secret of a Serve application in this Ray cluster; made at the first call."""
    key = f"secret:{application}"
    _internal_kv_put(key, secrets.token_hex(32), overwrite=False, namespace=_NAMESPACE)
    stored = _internal_kv_get(key, namespace=_NAMESPACE)
    assert stored is not None, "Ray's key-value store lost what was just written"
    return bytes(stored).decode()
