"""Which replicas are alive, as Ray Serve says, and a connection to each of them.

Owns the subscription to Serve's list of running replicas and the tasks that connect. The list is
Serve's; a connection that breaks is known at once, several seconds before the list says so.
"""

import asyncio
import logging
import time
from functools import partial
from typing import Any

import ray
from ray.serve._private.common import DeploymentID
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.context import _get_global_client

from engine.channel import connect
from engine.wire import Kind
from kvtransfer.tls import Tls
from router.engine_ends import EngineEnds
from router.errors import PairNotReady
from router.pool import Pool, Replica

logger = logging.getLogger(__name__)

RECONNECT_S = 1.0
WARM_UP_TIMEOUT_S = 30.0
WATCH_S = 1.0
"""How often silent replicas are looked for."""


class Membership:
    """Keeps pools in step with Serve. Owns one connecting task per listed, unconnected replica."""

    def __init__(
        self,
        pools: tuple[Pool, ...],
        *,
        application: str,
        secret: str,
        tls: Tls | None = None,
        stall_timeout_s: float,
        engine_ends: EngineEnds,
    ) -> None:
        self._pools = pools
        self._engine_ends = engine_ends
        self._prefill, self._decode = pools
        self._prefill_engines: set[str] = set()
        """That decode engines were told of."""
        self._told: dict[str, str] = {}
        """What was last logged of a replica that cannot join yet."""
        self._secret, self._tls = secret, tls
        self._stall_timeout_s = stall_timeout_s
        self._router_id = ray.get_runtime_context().get_worker_id()
        self._listed: dict[str, dict[str, dict[str, Any]]] = {pool.name: {} for pool in pools}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        controller = _get_global_client()._controller
        listeners = {
            (
                LongPollNamespace.DEPLOYMENT_TARGETS,
                DeploymentID(name=pool.name, app_name=application),
            ): self._listener(pool)
            for pool in pools
        }
        self._subscription = LongPollClient(
            controller,
            listeners,
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"pdserve-router:{self._router_id}",
        )
        self._watching = asyncio.create_task(self._watch())

    def close(self) -> None:
        self._subscription.stop()
        self._watching.cancel()
        for task in self._connecting.values():
            task.cancel()

    def _listener(self, pool: Pool) -> Any:
        def update(targets: Any) -> None:
            self._update(
                pool,
                {
                    info.replica_id.unique_id: info.replica_metadata
                    for info in targets.running_replicas
                    if info.replica_metadata
                },
            )

        return update

    def _update(self, pool: Pool, listed: dict[str, dict[str, Any]]) -> None:
        """Serve's list has changed."""
        self._listed[pool.name] = listed
        for replica in pool:
            replica.set_listed(replica.replica_id in listed)
        connected = {replica.replica_id for replica in pool}
        for replica_id, metadata in listed.items():
            if replica_id not in connected and replica_id not in self._connecting:
                task = asyncio.create_task(self._connect(pool, replica_id, metadata))
                self._connecting[replica_id] = task
                task.add_done_callback(partial(self._connected, replica_id))
        self._forget_gone()

    def _connected(self, replica_id: str, _: asyncio.Task[None]) -> None:
        self._connecting.pop(replica_id, None)

    async def _connect(self, pool: Pool, replica_id: str, metadata: dict[str, Any]) -> None:
        """Connects to a replica, again and again, for as long as Serve lists it."""
        while replica_id in self._listed[pool.name]:
            replica = Replica(replica_id, pool, on_gone=self._lost)
            try:
                address = (metadata["host"], metadata["port"])
                replica.end, replica.facts = await connect(
                    address,
                    secret=self._secret,
                    router_id=self._router_id,
                    replica_id=replica_id,
                    owner=replica,
                    tls=self._tls,
                    stall_timeout_s=self._stall_timeout_s,
                )
                await self._warm_up(replica)
            except Exception as error:
                # Whatever keeps this one away, the others must still be reached: try again.
                self._tell(replica, str(error) or type(error).__name__)
                if replica.end is not None:
                    replica.end.close("it is tried again")
                await asyncio.sleep(RECONNECT_S)
                continue
            self._told.pop(replica_id, None)
            pool.insert(replica)
            return
        self._told.pop(replica_id, None)

    async def _warm_up(self, replica: Replica) -> None:
        """Makes every pair of engines that this replica completes ready, before it gets traffic."""
        is_prefill = replica.pool is self._prefill
        others = self._decode if is_prefill else self._prefill
        ready: set[str] = set()
        # Another one may have joined in the meantime.
        while cold := [other for other in others if other.replica_id not in ready]:
            pairs = [(replica, other) if is_prefill else (other, replica) for other in cold]
            await asyncio.gather(*(self._warm_pair(*pair) for pair in pairs))
            ready |= {other.replica_id for other in cold}

    async def _warm_pair(self, prefill: Replica, decode: Replica) -> None:
        assert prefill.facts is not None
        self._prefill_engines.add(prefill.replica_id)
        async with asyncio.timeout(WARM_UP_TIMEOUT_S):
            problem = await decode.warm_up(prefill.facts.kv)
        if problem is not None:
            raise PairNotReady(prefill.replica_id, decode.replica_id, problem)

    def _forget_gone(self) -> None:
        """Has decode engines drop what they keep of prefill engines that will not come back."""
        alive = {replica.replica_id for replica in self._prefill} | self._connecting.keys()
        if gone := self._prefill_engines - alive - self._listed["prefill"].keys():
            self._prefill_engines -= gone
            for decode in self._decode:
                assert decode.end is not None
                decode.end.send(Kind.FORGET, sorted(gone))

    def _tell(self, replica: Replica, problem: str) -> None:
        if self._told.get(replica.replica_id) != problem:
            self._told[replica.replica_id] = problem
            logger.warning("%s replica %s: %s", replica.pool.name, replica.replica_id, problem)

    async def _watch(self) -> None:
        """Ends connections to replicas that hang."""
        while True:
            await asyncio.sleep(WATCH_S)
            for pool in self._pools:
                pool.end_silent(now_s=time.monotonic(), timeout_s=self._stall_timeout_s)

    def _lost(self, replica: Replica) -> None:
        """A connection broke: if Serve still lists the replica, it is tried again."""
        self._engine_ends.observe(replica)
        self._update(replica.pool, self._listed[replica.pool.name])
