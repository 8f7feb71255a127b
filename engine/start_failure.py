"""An engine that ended before its replica had joined: a router is told, for its metrics.

Routers have no connection to such a replica, and what it counts itself goes with it. Owns the call,
over Serve, to whichever router Serve picks.
"""

import asyncio
import logging

from ray import serve

from engine.exit_cause import EngineExit

logger = logging.getLogger(__name__)

ROUTER = "router"
"""The deployment's name (`cluster.app`)."""
METHOD = "engine_ended_at_start"
TIMEOUT_S = 5.0


async def tell_router(application: str, pool: str, replica_id: str, how: EngineExit) -> None:
    """Returns when a router knows, or when it is clear that none does."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            router = serve.get_deployment_handle(ROUTER, application)
            await getattr(router, METHOD).remote(pool, replica_id, how)
    except Exception as error:
        # The start has failed already, and says so to Serve; this must not hide why.
        logger.warning("no router was told that the engine has ended: %r", error)
