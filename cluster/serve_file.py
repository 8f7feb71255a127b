"""The Serve config file: where the cluster's config stands in it, and the address it serves.

Owns reading and refusing such files. Never starts or contacts anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterConfig, parse_args
from cluster.engine_options import check_engine_options
from cluster.errors import ConfigError
from cluster.parsing import did_you_mean, parse_model

IMPORT_PATH = "cluster.app:build"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """What this project needs of a valid Serve config file."""

    path: Path
    config: ClusterConfig
    host: str
    port: int
    app_name: str
    route_prefix: str

    @property
    def url(self) -> str:
        """Where a client on this machine finds the application, without a slash at the end."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
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
        raise ConfigError(f"{path}: {error}") from None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(error.strerror) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"is not YAML: {place}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError("is not a Serve config file: a mapping with applications is expected")
    return document


def _parse(path: Path, document: Mapping[str, Any]) -> ServeFile:
    # Imported here: it takes a second, and the application itself, which only parses args, is
    # spared it.
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    # Serve ignores the fields it does not know, so a misspelt one would be lost in silence.
    _refuse_unknown(document, ServeDeploySchema.model_fields, "")
    _refuse_unknown(document.get("http_options"), HTTPOptionsSchema.model_fields, "http_options.")
    applications = document.get("applications")
    if isinstance(applications, list):
        if len(applications) != 1:
            raise ConfigError(f"applications: {len(applications)} are listed, must be one")
        _refuse_unknown(applications[0], ServeApplicationSchema.model_fields, "applications.0.")
    schema = parse_model(ServeDeploySchema, document)
    (application,) = schema.applications
    if application.import_path != IMPORT_PATH:
        raise ConfigError(
            f"applications.0.import_path: {application.import_path!r} is not {IMPORT_PATH}"
        )
    if application.route_prefix is None:
        raise ConfigError("applications.0.route_prefix: null is not a path such as /")
    if not 1 <= schema.http_options.port <= 65535:
        raise ConfigError(
            f"http_options.port: {schema.http_options.port} is not between 1 and 65535"
        )
    config = parse_args(application.args)
    check_engine_options(config)
    return ServeFile(
        path=path,
        config=config,
        host=schema.http_options.host,
        port=schema.http_options.port,
        app_name=application.name,
        route_prefix=application.route_prefix,
    )


def _refuse_unknown(section: object, known: Mapping[str, Any], prefix: str) -> None:
    if not isinstance(section, dict):
        return  # absent, or the schema says what it should be
    for name in section:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"{prefix}{name}: no such field; {hint}")
