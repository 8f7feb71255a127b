"""Serve's REST API against a server of a few lines."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from benchmarks.serve_api import ServeApi, ServeReplica

CONFIG = """\
http_options: {port: 8000}
applications:
  - name: pdserve
    import_path: cluster.app:build
    args: {model: demo}
"""
RUNNING = {"replica_id": "a1", "state": "RUNNING", "pid": 7, "node_id": "n"}
# Serve leaves out what it does not know yet.
STARTING = {"replica_id": "b2", "state": "STARTING"}
LISTED = {
    "applications": {
        "pdserve": {
            "deployments": {"router": {"replicas": [RUNNING]}, "decode": {"replicas": [STARTING]}}
        }
    }
}


class Dashboard:
    """Answers every request with one status, and keeps what came."""

    def __init__(self) -> None:
        self.status = "200 OK"
        self.heads: list[str] = []
        self.bodies: list[Any] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head.splitlines()[0])
        lengths = [line for line in head.lower().splitlines() if line.startswith("content-length")]
        if lengths:
            num_bytes = int(lengths[0].partition(":")[2])
            self.bodies.append(json.loads(await reader.readexactly(num_bytes)))
        body = json.dumps(LISTED)
        writer.write(
            f"HTTP/1.1 {self.status}\r\nContent-Length: {len(body)}\r\n"
            f"Connection: close\r\n\r\n{body}".encode()
        )
        await writer.drain()
        writer.close()


@pytest_asyncio.fixture
async def dashboard() -> AsyncIterator[tuple[Dashboard, str]]:
    dashboard = Dashboard()
    server = await asyncio.start_server(dashboard.serve, "127.0.0.1", 0)
    async with server:
        yield dashboard, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def api(folder: Path, url: str) -> ServeApi:
    (folder / "log").write_text(f"ready in 9 s\n  dashboard  {url}\n  try  curl ...\n")
    (folder / "config.yaml").write_text(CONFIG)
    return ServeApi(folder / "log", folder / "config.yaml")


async def test_replicas(dashboard: tuple[Dashboard, str], tmp_path: Path) -> None:
    _, url = dashboard

    assert await api(tmp_path, url).replicas() == (
        ServeReplica(deployment="router", replica_id="a1", state="RUNNING", pid=7),
        ServeReplica(deployment="decode", replica_id="b2", state="STARTING", pid=None),
    )


async def test_scale_changes_nothing_else(dashboard: tuple[Dashboard, str], tmp_path: Path) -> None:
    seen, url = dashboard

    await api(tmp_path, url).scale({"decode": 2})

    assert seen.heads == ["PUT /api/serve/applications/ HTTP/1.1"]
    ((application,),) = (body.pop("applications") for body in seen.bodies)
    assert application.pop("deployments") == [{"name": "decode", "num_replicas": 2}]
    assert application == {
        "name": "pdserve",
        "import_path": "cluster.app:build",
        "args": {"model": "demo"},
    }
    assert seen.bodies == [{"http_options": {"port": 8000}}]


async def test_a_refusal_is_an_error(dashboard: tuple[Dashboard, str], tmp_path: Path) -> None:
    seen, url = dashboard
    seen.status = "400 Bad Request"

    with pytest.raises(httpx.HTTPStatusError):
        await api(tmp_path, url).scale({"decode": 2})


def test_a_log_without_a_dashboard(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("starting Ray\n")

    with pytest.raises(ValueError, match="dashboard"):
        ServeApi(tmp_path / "log", tmp_path / "config.yaml")
