"""What members of an application know each other by, and how it reaches an engine's processes.

It goes with the engine's configuration, as an attribute of which vLLM knows nothing: pickled
through a pipe from process to process, on no command line, in no environment, and in nothing that
vLLM logs of its configuration. It is one of a part of the configuration: of the whole, vLLM makes
copies for draft models and for parts of multimodal ones, and raises for an attribute it does not
know.
"""

from dataclasses import dataclass, field
from typing import Any

from kvtransfer.errors import SecretMissing
from kvtransfer.tls import TlsFiles

_CREDENTIALS = "pdserve_credentials"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The application's secret, and its TLS files where connections are encrypted."""

    secret: str = field(repr=False)
    tls: TlsFiles | None = None


def give_credentials(vllm_config: Any, credentials: Credentials) -> None:
    """To be called before an engine core is started with this configuration."""
    setattr(vllm_config.scheduler_config, _CREDENTIALS, credentials)


def credentials_of(vllm_config: Any) -> Credentials:
    """What this engine and its peers know each other by. Raises SecretMissing."""
    part = vllm_config.scheduler_config
    credentials: Credentials | None = getattr(part, _CREDENTIALS, None)
    if credentials is None:
        raise SecretMissing("this engine was given no secret: see kvtransfer.credentials")
    return credentials
