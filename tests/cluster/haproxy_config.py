"""The config that Serve writes for HAProxy."""

from pathlib import Path

from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from cluster.ports import LOCALHOST


def haproxy_api(
    folder: Path, ports: tuple[int, int, int, int], *, knows_application: bool = True
) -> HAProxyApi:
    """Serve's own keeper of HAProxy, for one application with one router.

    `ports` are those of the API, the router, the metrics and the statistics.
    """
    api, router, metrics, stats = ports
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        http_options=HTTPOptions(host=LOCALHOST, port=api),
        metrics_port=metrics,
        stats_port=stats,
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
    )
    server = ServerConfig(name="router", host=LOCALHOST, port=router)
    fallback = ServerConfig(name="proxy", host=LOCALHOST, port=1)
    backend = BackendConfig(
        name="app", path_prefix="/", app_name="app", servers=[server], fallback_server=fallback
    )
    backends = {"app": backend} if knows_application else {}
    return HAProxyApi(config, backends, str(folder / "haproxy.cfg"))


def haproxy_of_serve(
    folder: Path, ports: tuple[int, int, int, int], *, knows_application: bool = True
) -> Path:
    """The file that Serve has written."""
    api = haproxy_api(folder, ports, knows_application=knows_application)
    api._generate_config_file_internal()
    return Path(api.config_file_path)
