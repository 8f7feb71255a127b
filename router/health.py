"""`GET /health`: whether both pools can serve, and if not, why.

Owns the answer's form. 200 while each pool has a live replica, else 503; either way the body is
JSON and has the last engine that ended.
"""

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.engine_ends import EngineEnds
from router.pool import Pool

PATH = "/health"


class Health:
    """Answers in vLLM's place, which would say 503 and no more."""

    def __init__(
        self,
        pools: tuple[Pool, ...],
        ends: EngineEnds,
        starting: Callable[[], Awaitable[Mapping[str, str]]],
    ) -> None:
        """`starting` says what Serve reports of deployments that do not run as they should."""
        self._pools = pools
        self._ends = ends
        self._starting = starting
        self.is_served: Callable[[], bool] = lambda: True
        """Whether vLLM's front end still hands out what engines compute. Set by who makes it."""

    def route(self) -> Route:
        return Route(PATH, self._answer, methods=["GET"])

    async def _answer(self, request: Request) -> Response:
        # Where vLLM's front end has given up, it serves nobody, whatever the pools do.
        is_open = all(pool.is_open for pool in self._pools) and self.is_served()
        body: dict[str, Any] = {
            "status": "ok" if is_open else "unavailable",
            "replicas": {pool.name: len(pool.ledger) for pool in self._pools},
        }
        if (last := self._ends.last) is not None:
            body["last_engine_end"] = {
                "cause": last.exit.cause,
                "message": last.text,
                "at_s": round(last.at_s, 3),
            }
        if is_open:
            return JSONResponse(body)
        body["starting"] = dict(await self._starting())
        return JSONResponse(body, status_code=HTTPStatus.SERVICE_UNAVAILABLE)
