"""What takes long to start is started once per run, and while tests run that do not need it.

Owns the order of the tests and the servers of the end-to-end tests.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from node_network import why_not
from node_requests import one_engines_answers
from servers import Server, Servers, new_client

from benchmarks.audit import audit
from engine.models import resolve_model
from router.sandbox.process import SandboxProcess, zygote_arguments

LAST = ("e2e", "demo", "engine", "kvtransfer", "nodes")
"""The folders whose tests need the servers, then those whose tests need engines of their own."""

# As on the replicas of a cluster on CPUs (`cluster.app`): else vLLM's first logprobs are compiled,
# for tens of seconds, in every engine that a test starts.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

SETTLE_TIMEOUT_S = 300.0
"""Engines that a test has ended are started again, on a slow machine."""

RUNNING = pytest.StashKey[Servers]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LAST.index(folder) + 1 if folder in LAST else 0

    items.sort(key=place)


def those_with_servers(session: pytest.Session) -> list[pytest.Item]:
    """Of the tests that were selected, in their order."""
    return [item for item in session.items if "servers" in getattr(item, "fixturenames", ())]


@pytest.fixture(scope="session", autouse=True)
def started_early(request: pytest.FixtureRequest) -> None:
    """The servers start with the first test of all, if there is one that needs them."""
    if those_with_servers(request.session):
        # What goes wrong is kept, and raised again in every test that needs them.
        with contextlib.suppress(Exception):
            request.getfixturevalue("servers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """They end after the last of those tests, while others run."""
    yield
    if item in those_with_servers(item.session)[-1:] and RUNNING in item.session.stash:
        item.session.stash[RUNNING].end_soon()


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("servers")) as servers:
        request.session.stash[RUNNING] = servers
        yield servers


@pytest.fixture(scope="session")
def both_servers(servers: Servers) -> tuple[Server, Server]:
    """The cluster and the plain server, ready."""
    return servers.ready()


@pytest_asyncio.fixture
async def cluster(both_servers: tuple[Server, Server]) -> AsyncIterator[Server]:
    """The cluster under test. After each test nothing of it may be left anywhere."""
    yield both_servers[0]
    left = await _left(both_servers[0].url)
    assert not left, left


async def _left(url: str) -> tuple[str, ...]:
    """What is left once nothing changes any more, or after a long time."""
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while (left := await audit(url)) and time.monotonic() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    return left


@pytest.fixture
def plain(both_servers: tuple[Server, Server]) -> Server:
    """One vLLM server with the same model and options."""
    return both_servers[1]


@pytest_asyncio.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client() as client:
        yield client


@pytest.fixture(scope="session")
def nodes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the logs of all clusters of several nodes, where this machine can make one up."""
    if reason := why_not():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("nodes")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def expected(nodes_folder: Path) -> dict[str, Any]:
    """What these clusters must answer. They start when the engine has ended: two cores are few."""
    return await one_engines_answers(nodes_folder / "plain.log")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def zygote() -> AsyncIterator[SandboxProcess]:
    """With the demo model's tokenizer, in the session's event loop: it takes seconds to start."""
    process = SandboxProcess(zygote_arguments(resolve_model("demo"), {}))
    process.start()
    try:
        yield process
    finally:
        await process.close()
