"""A connection to each replica that Ray Serve lists, and what follows when one ends.

Owns the tasks that connect. The list is Serve's; a connection that breaks is known at once, several
seconds before the list says so. What has gone wrong decides what is done (`router.faults`):

- connection lost: it is made again, at once and then every RECONNECT_S;
- replica silent: it is ended, and made again;
- engine stalled, engine ended: the replica gets nothing new, and Serve another in its place;
- node gone: every replica of that node is ended at once.

A replica that is lost with its node falls silent before Ray knows of the node: it is counted once
it has come back, or its node is gone, or long enough was asked.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from engine.channel import connect
from kvtransfer.tls import Tls
from router.engine_ends import EngineEnds, SeenFault
from router.faults import Fault
from router.pairs import Pairs
from router.pool import Pool, Replica
from router.serve_list import ListedReplica
from router.warm_ups import WarmUps

logger = logging.getLogger(__name__)

RECONNECT_S = 1.0
WATCH_S = 1.0
"""How often silent replicas are looked for, and pairs tried again that were not ready."""
SUSPECT_S = 180.0
"""How long Ray is asked about the node of a replica that was lost. To be sure takes it over a
minute: five checks in a row must fail, of up to 13 s each."""
ASK_S = 1.0
"""How often."""

FOR_GOOD = {Fault.ENGINE_STALLED, Fault.ENGINE_ENDED, Fault.NODE_GONE}
"""After these a replica does not come back: another is started in its place, under another id."""
UNEXPLAINED = {Fault.CONNECTION_LOST, Fault.REPLICA_SILENT}
"""Its node may be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lost:
    """A replica that was lost, perhaps with its node, and has not come back."""

    node_id: str
    seen: SeenFault
    """What it is counted as if the node is not gone."""
    until_s: float
    """How long that may be told."""


class Membership:
    """Keeps pools in step with Serve. Owns one connecting task per listed, unconnected replica."""

    def __init__(
        self,
        pools: tuple[Pool, Pool],
        pairs: Pairs,
        *,
        router_id: str,
        secret: str,
        tls: Tls | None = None,
        stall_timeout_s: float,
        engine_ends: EngineEnds,
        dead_nodes: Callable[[Collection[str]], Collection[str]],
    ) -> None:
        """`dead_nodes` says which of some nodes are dead; it may block (`router.nodes`)."""
        self._pools = {pool.name: pool for pool in pools}
        self._engine_ends = engine_ends
        self._warm_ups = WarmUps(*pools, pairs)
        self._router_id = router_id
        self._secret, self._tls = secret, tls
        self._stall_timeout_s = stall_timeout_s
        self._dead_nodes = dead_nodes
        self._listed: dict[str, Mapping[str, ListedReplica]] = {name: {} for name in self._pools}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._given_up: set[str] = set()
        """Replicas that do not come back, for as long as Serve lists them."""
        self._told: dict[str, str] = {}
        """What was last logged of a replica that cannot join yet."""
        self._suspects: dict[str, float] = {}
        """Nodes that Ray is asked about, and until when."""
        self._unexplained: dict[str, _Lost] = {}
        """By id. Serve may have given them up before Ray gives up their node."""
        self._asking: asyncio.Task[None] | None = None
        self._watching = asyncio.create_task(self._watch())

    def close(self) -> None:
        """Leaves the connections that there are, and makes none any more."""
        self._listed = {name: {} for name in self._pools}
        self._warm_ups.close()
        for task in (self._watching, self._asking, *self._connecting.values()):
            if task is not None:
                task.cancel()

    def listed(self, pool_name: str, replicas: Mapping[str, ListedReplica]) -> None:
        """Serve's list of a pool has changed."""
        self._listed[pool_name] = replicas
        for replica in self._pools[pool_name]:
            replica.set_listed(replica.replica_id in replicas)
        self._given_up &= {replica_id for each in self._listed.values() for replica_id in each}
        self._reconcile()

    def _wanted(self) -> dict[str, tuple[Pool, ListedReplica]]:
        """The replicas that there should be a connection to."""
        return {
            replica_id: (self._pools[name], listed)
            for name, replicas in self._listed.items()
            for replica_id, listed in replicas.items()
            if replica_id not in self._given_up
        }

    def _reconcile(self) -> None:
        """Connects to whom there is no connection; leaves those alone that are not wanted."""
        wanted = self._wanted()
        for replica_id in self._connecting.keys() - wanted.keys():
            self._connecting.pop(replica_id).cancel()
        for pool, listed in wanted.values():
            self._reach(pool, listed)
        self._told = {key: told for key, told in self._told.items() if key in wanted}
        joined = {replica.replica_id for pool in self._pools.values() for replica in pool}
        self._warm_ups.forget_all_but(wanted.keys() | joined)

    def _reach(self, pool: Pool, listed: ListedReplica, *, wait_s: float = 0.0) -> None:
        """Begins to connect to a replica to which there is no connection, after a while."""
        replica_id = listed.replica_id
        before = self._connecting.get(replica_id)
        if pool.get(replica_id) is None and (before is None or before.done()):
            task = asyncio.create_task(self._connect(pool, listed, wait_s))
            self._connecting[replica_id] = task
            task.add_done_callback(partial(self._connected, replica_id))

    def _connected(self, replica_id: str, task: asyncio.Task[None]) -> None:
        if self._connecting.get(replica_id) is task:
            del self._connecting[replica_id]

    async def _connect(self, pool: Pool, listed: ListedReplica, wait_s: float) -> None:
        """Connects to a replica until it has joined; cancelled where it is no longer wanted."""
        await asyncio.sleep(wait_s)
        while pool.get(listed.replica_id) is None:
            replica = Replica(
                listed.replica_id,
                pool,
                on_gone=self._lost,
                on_unready=self._warm_ups.broken,
                node_id=listed.node_id,
            )
            try:
                replica.end, replica.facts = await connect(
                    listed.address,
                    secret=self._secret,
                    router_id=self._router_id,
                    replica_id=listed.replica_id,
                    owner=replica,
                    tls=self._tls,
                    stall_timeout_s=self._stall_timeout_s,
                )
                await self._warm_ups.join(replica)
                self._told.pop(replica.replica_id, None)
                if (lost := self._unexplained.pop(replica.replica_id, None)) is not None:
                    self._engine_ends.count(lost.seen)
                return
            except Exception as error:
                # Whatever keeps this one away, the others must still be reached: try again.
                self._tell(replica, str(error) or type(error).__name__)
            finally:
                if not replica.has_joined and replica.end is not None:
                    replica.end.close("it could not join")
            await asyncio.sleep(RECONNECT_S)

    def _tell(self, replica: Replica, problem: str) -> None:
        if self._told.get(replica.replica_id) != problem:
            self._told[replica.replica_id] = problem
            logger.warning("%s replica %s: %s", replica.pool.name, replica.replica_id, problem)

    def _lost(self, replica: Replica) -> None:
        """A connection has ended."""
        self._warm_ups.gone(replica)
        fault, now_s = replica.fault, time.monotonic()
        if fault in UNEXPLAINED and replica.node_id is not None:
            self._suspect(replica.node_id, replica, now_s)
        else:
            self._engine_ends.observe(replica)
        if replica.exit is not None:
            # Which may be why it was lost before.
            self._unexplained.pop(replica.replica_id, None)
        listed = self._listed[replica.pool.name].get(replica.replica_id)
        if listed is None or fault in FOR_GOOD:
            if listed is not None:
                self._given_up.add(replica.replica_id)
            self._reconcile()
            return
        # One that lets us in and cuts us off must not keep us busy.
        lived_s = now_s - replica.joined_s
        wait_s = 0.0 if lived_s >= RECONNECT_S else RECONNECT_S
        self._reach(replica.pool, listed, wait_s=wait_s)

    async def _watch(self) -> None:
        """Ends connections to replicas that hang, and gives pairs another try."""
        while True:
            await asyncio.sleep(WATCH_S)
            self._end_silent(time.monotonic())
            self._warm_ups.retry()

    def _end_silent(self, now_s: float) -> None:
        for replica in self._replicas():
            replica.end_if_silent(now_s=now_s, timeout_s=self._stall_timeout_s)

    def _replicas(self) -> tuple[Replica, ...]:
        """Those that there is a connection to."""
        joined = (replica for pool in self._pools.values() for replica in pool)
        return (*joined, *self._warm_ups.joining)

    # Nodes.

    def _suspect(self, node_id: str, replica: Replica, now_s: float) -> None:
        self._suspects[node_id] = now_s + SUSPECT_S
        if (seen := self._engine_ends.see(replica)) is not None:
            self._unexplained[replica.replica_id] = _Lost(
                node_id=node_id, seen=seen, until_s=now_s + SUSPECT_S
            )
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Asks Ray about the suspects for as long as there are any."""
        while self._suspects:
            try:
                dead = await asyncio.to_thread(self._dead_nodes, tuple(self._suspects))
            except Exception as error:
                # Whatever Ray raises: silence tells in the end too.
                logger.warning("Ray does not say which nodes are dead: %r", error)
                dead = ()
            for node_id in dead:
                self._node_gone(node_id)
            self._end_suspicions(time.monotonic())
            await asyncio.sleep(ASK_S)

    def _end_suspicions(self, now_s: float) -> None:
        self._suspects = {
            key: until_s for key, until_s in self._suspects.items() if until_s > now_s
        }
        for replica_id, lost in list(self._unexplained.items()):
            if lost.until_s <= now_s:
                del self._unexplained[replica_id]
                self._engine_ends.count(lost.seen)

    def _node_gone(self, node_id: str) -> None:
        """Ends what is on a dead node at once, instead of waiting for the silence of each."""
        self._suspects.pop(node_id, None)
        reason = f"its node {node_id} is dead"
        on_node = [replica for replica in self._replicas() if replica.node_id == node_id]
        for replica in on_node:
            replica.is_node_dead = True
            assert replica.end is not None
            replica.end.close(reason)
        gone = {
            replica_id: lost.seen.pool
            for replica_id, lost in self._unexplained.items()
            if lost.node_id == node_id
        }
        for replica_id, (pool, listed) in self._wanted().items():
            if listed.node_id == node_id:
                self._given_up.add(replica_id)
                gone[replica_id] = pool.name
        for replica_id in gone.keys() - {each.replica_id for each in on_node if each.has_joined}:
            self._unexplained.pop(replica_id, None)
            self._engine_ends.add_fault(gone[replica_id], replica_id, Fault.NODE_GONE, reason)
        self._reconcile()
