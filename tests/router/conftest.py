"""The sandbox's zygote loads vLLM, which takes seconds: one for all tests that need it."""

from collections.abc import AsyncIterator

import pytest_asyncio

from engine.models import resolve_model
from router.sandbox.process import SandboxProcess, zygote_arguments


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def zygote() -> AsyncIterator[SandboxProcess]:
    """With the demo model's tokenizer. To be used in the session's event loop."""
    process = SandboxProcess(zygote_arguments(resolve_model("demo"), {}))
    process.start()
    try:
        yield process
    finally:
        await process.close()
