"""What may stand around the args in a Serve config file.

Owns the fields that are Serve's own: refuses those that it does not know, that it would ignore, or
that would overrule the args. What a value may be, Serve's own schema is asked.
"""

import ipaddress
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from ray._common.ray_option_utils import validate_actor_options
from ray._common.utils import resources_from_ray_options
from ray.runtime_env import RuntimeEnv
from ray.serve._private.utils import validate_route_prefix
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.parsing import did_you_mean, parse_model, shown
from cluster.sections import PoolConfig, RouterConfig
from kvtransfer.phase import PHASES

IMPORT_PATH = "cluster.app:build"

_TLS = "HAProxy speaks plain HTTP here; let what stands before it end TLS"
_REFUSED = {
    "applications.0.autoscaling_policy": "set max_replicas of a pool in args instead",
    "applications.0.deployments": "set sizes and resources of the pools in args instead",
    "applications.0.external_scaler_enabled": "set max_replicas of a pool in args instead",
    "applications.0.host": "set http_options.host instead",
    "applications.0.port": "set http_options.port instead",
    "grpc_options.grpc_servicer_functions": "the API is HTTP only",
    "http_options.ssl_ca_certs": _TLS,
    "http_options.ssl_certfile": _TLS,
    "http_options.ssl_keyfile": _TLS,
    "http_options.ssl_keyfile_password": _TLS,
    "target_capacity": "set the sizes of the pools in args instead",
}
"""Fields of Serve that make it run something else than the args say, and what to set instead."""

_ANCHORS = "x-"
"""Begins the names of fields at the top that only hold what others refer to, as elsewhere."""
_SEGMENT = r"/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+"
_ROUTE = re.compile(rf"/|(?:{_SEGMENT})+")
# The last part of a name has a letter; one that has none is a mistyped address.
_HOST_NAME = re.compile(r"(?:(?!-)[A-Za-z0-9-]{1,63}\.)*(?!-)(?=[0-9-]*[A-Za-z])[A-Za-z0-9-]{1,63}")
_APP_NAME = re.compile(r"[A-Za-z0-9._-]+")


def parse_serve_fields(document: Mapping[str, Any]) -> ServeDeploySchema:
    """Serve's fields of a config file with one application; its args are not looked at.

    Raises:
        ConfigError: one line with the field and what it may be.
    """
    applications = document.get("applications")
    if isinstance(applications, list) and len(applications) != 1:
        raise ConfigError(f"applications: {len(applications)} are listed, must be one")
    for path, name, value, known in _fields(document, ServeDeploySchema, ""):
        if path == name and name.startswith(_ANCHORS):
            continue
        if name not in known:
            raise ConfigError(f"{path}: no such field; {did_you_mean(name, known)}")
        if path in _REFUSED and value not in (None, False, []):
            raise ConfigError(f"{path}: may not be set here: {_REFUSED[path]}")
    schema = parse_model(ServeDeploySchema, document)
    # A port `yes` is no port 1.
    parse_model(
        HTTPOptionsSchema, document.get("http_options", {}), section="http_options", strict=True
    )
    if schema.proxy_location == "Disabled":
        raise ConfigError(
            "proxy_location: Disabled leaves nobody to answer; must be EveryNode or HeadOnly"
        )
    _check_address(schema.http_options)
    _check_application(schema.applications[0])
    return schema


def check_ray_options(config: ClusterConfig) -> None:
    """Refuses what Ray would not take as the resources or labels of a replica.

    Raises:
        ConfigError: one line with the field and Ray's reason.
    """
    for section, options in (
        ("router", _ray_options(config.router)),
        *((name, _ray_options(config.pool(name))) for name in PHASES),
    ):
        for field, (option, value) in options.items():
            try:
                validate_actor_options({option: value}, in_options=False)
                resources_from_ray_options({option: value})
            except ValueError as error:
                raise ConfigError(f"{section}.{field}: {error}") from None


def _ray_options(section: PoolConfig | RouterConfig) -> dict[str, tuple[str, Any]]:
    num_nodes = section.nodes if isinstance(section, PoolConfig) else 1
    per_node = {name: amount / num_nodes for name, amount in section.resources.items()}
    return {
        "cpus": ("num_cpus", section.cpus / num_nodes),
        "resources": ("resources", per_node),
        "labels": ("label_selector", section.labels),
    }


def _fields(
    values: object, model: type[BaseModel], prefix: str
) -> Iterator[tuple[str, str, object, Mapping[str, Any]]]:
    """Path, name, value and the known names of each field, in sections within sections too."""
    if not isinstance(values, dict):
        return  # absent, or the schema says what it should be
    for key, value in values.items():
        path = f"{prefix}{shown(key)}"
        yield path, str(key), value, model.model_fields
        if key in model.model_fields:
            inner = _section(model.model_fields[key].annotation)
            if inner is not None:
                for index, part in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    deeper = f"{path}." if index is None else f"{path}.{index}."
                    yield from _fields(part, inner, deeper)


def _section(hint: Any) -> type[BaseModel] | None:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    parts = (_section(part) for part in typing.get_args(hint))
    return next((part for part in parts if part is not None), None)


def _check_address(options: HTTPOptionsSchema) -> None:
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"http_options.port: {options.port} is not between 1 and 65535")
    for name, least in (("keep_alive_timeout_s", 0), ("request_timeout_s", 0.001)):
        if (seconds := getattr(options, name)) is not None and seconds < least:
            raise ConfigError(f"http_options.{name}: {seconds:g} is not at least {least:g}")
    if options.root_path and not _ROUTE.fullmatch(options.root_path):
        raise ConfigError(
            f"http_options.root_path: {shown(repr(options.root_path))} is not a path like /llm"
        )
    try:
        ipaddress.ip_address(options.host)
    except ValueError:
        if not _HOST_NAME.fullmatch(options.host):
            raise ConfigError(
                f"http_options.host: {shown(repr(options.host))} is not an address of this "
                "machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
            ) from None


def _check_application(application: ServeApplicationSchema) -> None:
    if application.import_path != IMPORT_PATH:
        raise ConfigError(
            f"applications.0.import_path: {shown(repr(application.import_path))} is not "
            f"{IMPORT_PATH}"
        )
    if not _APP_NAME.fullmatch(application.name):
        raise ConfigError(
            f"applications.0.name: {shown(repr(application.name))} is not letters, digits, and "
            ". _ -"
        )
    try:
        RuntimeEnv(**application.runtime_env)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"applications.0.runtime_env: {error}") from None
    route = application.route_prefix
    if route is None:
        raise ConfigError("applications.0.route_prefix: null is not a path such as /")
    try:
        validate_route_prefix(route)
    except ValueError as error:
        raise ConfigError(f"applications.0.route_prefix: {error}") from None
    if not _ROUTE.fullmatch(route):
        raise ConfigError(
            f"applications.0.route_prefix: {shown(repr(route))} is not / or a path of letters, "
            "digits, and . _ ~ -, such as /llm"
        )
