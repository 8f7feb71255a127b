"""What one router knows of one pool, and where requests go by it. Pure.

Owns the ledger, the index of cached prefixes, and what is known of the pool's costs. Knows no
connection: the clock and the random numbers are given, so that the simulator's routers plan with
the same class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Protocol

from kvtransfer.phase import Phase
from router.cost_fit import CostFit, PoolCost
from router.errors import NoReplica
from router.ledger import Ledger
from router.policies import Policy, ReplicaPlan, Rng
from router.prefixes import PrefixIndex
from router.transfers import TransferEstimate, Transfers


class ReplicaReport(Protocol):
    """What plans need of a replica's last report."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_usage_fraction(self) -> float: ...
    @property
    def has_suspect(self) -> bool: ...


class PlannedReplica(Protocol):
    """What plans need of a replica."""

    @property
    def replica_id(self) -> str: ...
    @property
    def is_leaving(self) -> bool: ...
    @property
    def work_s(self) -> float: ...
    @property
    def prefilling_s(self) -> float: ...
    @property
    def kv_bytes_per_token(self) -> float | None: ...
    @property
    def num_ranks(self) -> int: ...
    @property
    def load(self) -> ReplicaReport: ...


class PoolPlanner(ABC):
    """One router's view of one pool. Who has the replicas tells it of them."""

    def __init__(
        self,
        name: Phase,
        policy: Policy,
        rng: Rng,
        clock: Callable[[], float],
        *,
        num_routers: int = 1,
        transfers: Transfers | None = None,
        cost: PoolCost | None = None,
    ) -> None:
        """
        Args:
            clock: seconds that never run backwards.
            transfers: shared with the other pool.
            cost: what is known before the first step is observed.
        """
        self.name = name
        self.transfers = transfers or Transfers()
        self.ledger = Ledger(num_routers=num_routers, drains=name == "prefill")
        self.prefixes = PrefixIndex()
        self.block_size: int | None = None
        """Tokens of a block of `prefixes`; None before the first replica."""
        self._fit = CostFit(cost)
        self._policy = policy
        self._rng = rng
        self._clock = clock

    @abstractmethod
    def __getitem__(self, replica_id: str) -> PlannedReplica: ...

    @abstractmethod
    def __iter__(self) -> Iterator[PlannedReplica]: ...

    @property
    def cost(self) -> PoolCost:
        """The cost model, as fitted so far."""
        return self._fit.cost

    @property
    def is_open(self) -> bool:
        """Whether a replica may get new work."""
        return len(self.ledger) > 0

    def joined(self, replica_id: str, node_id: str | None) -> None:
        """A replica may get work from now on."""
        self.ledger.insert(replica_id, self._clock())
        self.transfers.insert(replica_id, node_id)

    def left(self, replica_id: str) -> None:
        """A replica is gone, and all that it had with it."""
        self.ledger.remove(replica_id)
        self.prefixes.remove(replica_id)
        self.transfers.remove(replica_id)

    def plan(
        self,
        request_s: float,
        cached: Mapping[str, tuple[int, float]] | None = None,
        *,
        barred: Set[str] = frozenset(),
        transfer: TransferEstimate | None = None,
    ) -> ReplicaPlan:
        """The replica for a request, by the configured policy; arguments as in `Ledger.snapshot`.

        Raises:
            NoReplica: none may get new work, or only some that are `barred`.
        """
        if not self.ledger.has_open(barred):
            raise NoReplica(self.name)
        snapshot = self.ledger.snapshot(
            self._clock(),
            request_s=request_s,
            cached=cached,
            barred=barred,
            transfer=transfer,
        )
        return self._policy(snapshot, self._rng)

    def plan_transfer(
        self,
        prefill_id: str,
        request_s: float,
        *,
        num_bytes: float | None,
        num_steps: int,
        barred: Set[str] = frozenset(),
    ) -> ReplicaPlan:
        """The replica for what another pool's has computed. Raises NoReplica as `plan` does.

        Args:
            num_bytes: that each rank reads; None where that is not known.
            num_steps: of the response, which spreads over them what its KV takes to come.
        """
        transfer = None
        if num_bytes is not None:
            transfer = self.transfers.estimate(
                prefill_id, num_bytes=num_bytes, num_steps=num_steps, now_s=self._clock()
            )
        return self.plan(request_s, barred=barred, transfer=transfer)

    def num_cached(self, chain: Sequence[int], num_tokens: int) -> dict[str, int]:
        """Tokens of a prompt that replicas are thought to have, the last one never among them.

        Without regard to `prefixes.trust`.
        """
        if self.block_size is None or not chain:
            return {}
        hits, block_size, most = self.prefixes.lookup(chain), self.block_size, num_tokens - 1
        return {key: min(most, blocks * block_size) for key, blocks in hits.items()}

    def plan_prefill(
        self, chain: Sequence[int], num_tokens: int, *, barred: Set[str] = frozenset()
    ) -> ReplicaPlan:
        """The replica that is to prefill a prompt. Raises NoReplica as `plan` does."""
        cost, trust = self.cost.prefill, self.prefixes.trust
        cached: dict[str, tuple[int, float]] = {}
        for replica_id, num_cached in self.num_cached(chain, num_tokens).items():
            num_uncached = num_tokens - int(trust * num_cached)
            seconds = cost.seconds(num_uncached=num_uncached, num_tokens=num_tokens)
            cached[replica_id] = (num_cached, seconds)
        request_s = cost.seconds(num_uncached=num_tokens, num_tokens=num_tokens)
        return self.plan(request_s, cached, barred=barred)
