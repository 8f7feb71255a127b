"""What all clusters of nodes are tested with: one engine's answers, a client, a folder for logs."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from answers import COMPLETIONS, ask
from node_network import why_not
from node_requests import PROMPTS, body
from servers import await_line, new_client, plain_server


@pytest.fixture(scope="session")
def nodes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("nodes")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client() as client:
        yield client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def expected(nodes_folder: Path) -> dict[str, Any]:
    """One engine's answers. The clusters start when it has ended: two cores are few."""
    with plain_server(nodes_folder / "plain.log") as plain:
        await_line(plain, "Application startup complete")
        async with new_client() as client:
            return {name: await ask(client, plain.url, COMPLETIONS, body(name)) for name in PROMPTS}
