"""The Serve config file: where the cluster's config stands in it, and the address it serves.

Owns reading and refusing such files. Never starts or contacts anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig, parse_args
from cluster.engine_options import check_engine_options
from cluster.errors import ConfigError, shortened
from cluster.transfer_options import check_backends
from cluster.yaml_file import parse_yaml

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

PACK = "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY"
MAX_PATH = 120
"""Characters of a file's name in a message; the rest is for what is wrong in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """What this project needs of a valid Serve config file."""

    path: Path
    config: ClusterConfig
    host: str
    port: int
    app_name: str
    route_prefix: str
    packs_replicas: bool
    """Serve is told to fill one node after the other, not to spread replicas over all of them."""

    @property
    def url(self) -> str:
        """Where a client on this machine finds the application, without a slash at the end."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


def load_config(path: Path) -> ClusterConfig:
    """The cluster's config in a Serve config file; raises as `load_serve_file` does."""
    return load_serve_file(path).config


def load_serve_file(path: Path) -> ServeFile:
    """Reads and validates a Serve config file.

    Raises:
        ConfigError: one line with the file, the field and what it may be.
    """
    try:
        return _parse(path, _read(path))
    except ConfigError as error:
        raise ConfigError(f"{shortened(str(path), MAX_PATH)}: {error}") from None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text") from None
    if not isinstance(document, dict):
        raise ConfigError("is not a Serve config file: a mapping with applications is expected")
    return document


def _parse(path: Path, document: Mapping[str, Any]) -> ServeFile:
    # Imported here: it takes a second, and the application itself, which only parses args, is
    # spared it.
    from cluster.serve_fields import check_ray_options, parse_serve_fields

    schema = parse_serve_fields(document)
    (application,) = schema.applications
    config = parse_args(application.args)
    check_ray_options(config)
    check_backends(config)
    check_engine_options(config, whole=True)
    return ServeFile(
        path=path,
        config=config,
        host=schema.http_options.host,
        port=schema.http_options.port,
        app_name=application.name,
        route_prefix=application.route_prefix,
        packs_replicas=_controller_env(schema).get(PACK) == "1",
    )


def _controller_env(schema: "ServeDeploySchema") -> Mapping[str, str]:
    options = schema.controller_options
    env: Mapping[str, str] = ((options and options.runtime_env) or {}).get("env_vars", {})
    return env
