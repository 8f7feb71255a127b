"""Waits for the numbers of replicas that a test has asked for."""

import asyncio
import time
from collections.abc import Collection, Mapping

import psutil

from benchmarks.serve_api import ServeApi

SCALED_WITHIN_S = 150.0
SCALING_POLL_S = 0.5


async def until_scaled(
    api: ServeApi, nums: Mapping[str, int], *, replaced: Collection[str] = ()
) -> None:
    """Returns once exactly so many run, and none starts or stops.

    Args:
        replaced: ids of replicas that must be gone by then.
    """
    deadline_s = time.monotonic() + SCALED_WITHIN_S
    wanted = sorted((name, "RUNNING") for name, num in nums.items() for _ in range(num))
    while True:
        listed = [each for each in await api.replicas() if each.deployment in nums]
        states = sorted((each.deployment, each.state) for each in listed)
        # Serve lists one that was killed until it has looked for it.
        are_there = all(each.pid and psutil.pid_exists(each.pid) for each in listed)
        if (
            states == wanted
            and are_there
            and not {each.replica_id for each in listed} & set(replaced)
        ):
            return
        assert time.monotonic() < deadline_s, states
        await asyncio.sleep(SCALING_POLL_S)
