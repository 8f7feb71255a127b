"""The servers, started once per run, and what tests need to talk to them."""

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import pytest_asyncio
from servers import Server, new_client, running_servers


@pytest.fixture(scope="session")
def both_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    with running_servers(tmp_path_factory.mktemp("servers")) as servers:
        yield servers


@pytest.fixture
def cluster(both_servers: tuple[Server, Server]) -> Server:
    """The cluster under test."""
    return both_servers[0]


@pytest.fixture
def plain(both_servers: tuple[Server, Server]) -> Server:
    """One vLLM server with the same model and options."""
    return both_servers[1]


@pytest_asyncio.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client() as client:
        yield client
