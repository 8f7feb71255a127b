"""`GET /audit`: whether this router, its replicas and their engines agree on what they hold.

Asks the replicas and has `router.audit` compare. 200 where all agree, else 503; either way the body
is JSON. Owns nothing: what it looks at has owners of its own.
"""

import asyncio
from collections.abc import Callable, Iterable
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.errors import ChannelClosed
from engine.wire import Holdings
from router.audit import Audit, RouterHoldings, audit
from router.core import RouterCore

PATH = "/audit"
ANSWER_TIMEOUT_S = 10.0


class Auditor:
    """Asks everybody what they hold."""

    def __init__(self, core: RouterCore, front_end: Callable[[], Iterable[str]]) -> None:
        """`front_end`: ids of the requests that vLLM's front end waits for."""
        self._core = core
        self._front_end = front_end
        self._asking: asyncio.Future[Audit] | None = None

    def route(self) -> Route:
        return Route(PATH, self._answer, methods=["GET"])

    async def audit(self) -> Audit:
        """Compares what all hold now; whoever asks meanwhile gets the same answer."""
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._audit())
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    def _asked(self, _: asyncio.Future[Audit]) -> None:
        self._asking = None

    async def _audit(self) -> Audit:
        replicas = [replica for pool in self._core.pools for replica in pool]
        # Asked and looked at in the same turn of the loop: what is sent later comes later.
        asked = [replica.ask_holdings() for replica in replicas]
        before = self._holdings()
        answers = await asyncio.gather(*map(_answer_of, asked))
        held = {
            replica.replica_id: answer
            for replica, answer in zip(replicas, answers, strict=True)
            # One that has gone meanwhile holds nothing that counts.
            if replica in replica.pool
        }
        return audit(before, self._holdings(), held)

    def _holdings(self) -> RouterHoldings:
        return self._core.holdings(frozenset(self._front_end()))

    async def _answer(self, request: Request) -> Response:
        found = await self.audit()
        body = {
            "disagreements": list(found.disagreements),
            "num_requests": found.num_requests,
            "replicas": {
                replica_id: {
                    "num_requests": answer.num_requests,
                    "num_in_engine": answer.num_in_engine,
                    "num_kept": answer.num_kept,
                    "kv_usage_fraction": answer.kv_usage_fraction,
                }
                for replica_id, answer in found.held.items()
            },
        }
        agrees = not found.disagreements
        return JSONResponse(body, HTTPStatus.OK if agrees else HTTPStatus.SERVICE_UNAVAILABLE)


async def _answer_of(asked: asyncio.Future[Holdings]) -> Holdings | None:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await asked
    except (TimeoutError, ChannelClosed):
        return None
