"""How the application's secret reaches the processes of an engine.

It goes with the engine's configuration, as an attribute of which vLLM knows nothing: pickled
through a pipe from process to process, on no command line, in no environment, and in nothing that
vLLM logs of its configuration.
"""

from typing import Any

from kvtransfer.errors import SecretMissing

_SECRET = "pdserve_secret"


def give_secret(vllm_config: Any, secret: str) -> None:
    """To be called before an engine core is started with this configuration."""
    setattr(vllm_config, _SECRET, secret)


def secret_of(vllm_config: Any) -> str:
    """The secret that this engine shares with its peers. Raises SecretMissing."""
    secret: str | None = getattr(vllm_config, _SECRET, None)
    if not secret:
        raise SecretMissing("this engine was given no secret: see kvtransfer.secret.give_secret")
    return secret
