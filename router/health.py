"""`GET /health`: whether both pools can serve, and if not, why.

Owns the answer's form. 200 while each pool has a live replica, else 503; either way the body is
JSON and has the last engine that ended, the last fault of a replica, and pairs that do not work.
Where keys are set, causes are for those who have one.
"""

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from itertools import islice
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.api_keys import has_key
from router.engine_failures import EngineFailures
from router.pairs import Pairs
from router.pool import Pool

PATH = "/health"
MOST_PAIRS = 20
"""Pairs that are named at most."""


class Health:
    """Answers in vLLM's place, which would say 503 and no more."""

    def __init__(
        self,
        pools: tuple[Pool, ...],
        ends: EngineFailures,
        starting: Callable[[], Awaitable[Mapping[str, str]]],
        *,
        is_served: Callable[[], bool],
        pairs: Pairs,
    ) -> None:
        """`starting` says what Serve reports of deployments that do not run as they should,
        `is_served` whether vLLM's front end still hands out what engines compute."""
        self._pools = pools
        self._ends = ends
        self._starting = starting
        self._is_served = is_served
        self._pairs = pairs

    def route(self) -> Route:
        return Route(PATH, self._answer, methods=["GET"])

    async def _answer(self, request: Request) -> Response:
        # Where vLLM's front end has given up, it serves nobody, whatever the pools do.
        is_open = all(pool.is_open for pool in self._pools) and self._is_served()
        body: dict[str, Any] = {
            "status": "ok" if is_open else "unavailable",
            "replicas": {pool.name: len(pool.ledger) for pool in self._pools},
        }
        if has_key(request.scope):
            body |= self._causes()
            if not is_open:
                body["starting"] = dict(await self._starting())
        return JSONResponse(body, HTTPStatus.OK if is_open else HTTPStatus.SERVICE_UNAVAILABLE)

    def _causes(self) -> dict[str, Any]:
        causes: dict[str, Any] = {}
        if (last := self._ends.last) is not None:
            causes["last_engine_end"] = {
                "cause": last.exit.cause,
                "message": last.text,
                "at_s": round(last.at_s, 3),
            }
        if (fault := self._ends.last_fault) is not None:
            causes["last_fault"] = {
                "fault": fault.fault.value,
                "message": fault.text,
                "at_s": round(fault.at_s, 3),
            }
        if problems := _problems(self._pairs):
            causes["unready_pairs"] = problems
        return causes


def _problems(pairs: Pairs) -> list[dict[str, str]]:
    """The pairs that do not work, and why: none that is only being made ready."""
    failed = (
        {"prefill": pair.prefill, "decode": pair.decode, "problem": unready.problem}
        for pair, unready in pairs
        if unready.problem is not None
    )
    return list(islice(failed, MOST_PAIRS))
