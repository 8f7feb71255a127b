"""Whether the nodes of a Ray cluster can ever hold what a config would run on them.

Owns what a replica needs of its nodes. Pure: a replica that fits none waits for ever, which Serve
only says as "starting".
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.config import ClusterConfig
from kvtransfer.phase import PHASES

_SELECTOR = re.compile(r"(?P<no>!?)(?P<many>in)?\(?(?P<values>[^()]*)\)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaNeeds:
    """What one replica takes of each of its nodes; mostly it has one."""

    deployment: str
    resources: Mapping[str, float]
    """By Ray's names: CPU, GPU, and custom ones."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's label selector: values, `!value`, `in(value, value)`, `!in(value, value)`."""
    num_nodes: int = 1

    def __str__(self) -> str:
        places = [f"{key}={value}" for key, value in self.labels.items()]
        return " and ".join([amounts(self.resources), *places])

    @property
    def shape(self) -> str:
        """In words, with how many nodes it takes that of."""
        return f"{self}, on one node" if self.num_nodes == 1 else f"{self.num_nodes} nodes x {self}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a live node has in all, used or not."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def replica_needs(config: ClusterConfig) -> tuple[ReplicaNeeds, ...]:
    """What one replica of each deployment needs."""
    router = ReplicaNeeds(
        deployment="router",
        resources={"CPU": config.router.cpus, **config.router.resources},
        labels=config.router.labels,
    )
    pools = [(name, config.pool(name)) for name in PHASES]
    return (
        router,
        *(
            ReplicaNeeds(
                deployment=name,
                resources=pool.resources_per_node,
                labels=pool.labels,
                num_nodes=pool.nodes,
            )
            for name, pool in pools
        ),
    )


def placement_problem(needs: Sequence[ReplicaNeeds], nodes: Sequence[Node]) -> str | None:
    """Why one replica of each deployment cannot run on these nodes; None where it may."""
    for need in needs:
        num_fit = sum(_fits(need, node) for node in nodes)
        if num_fit < need.num_nodes:
            is_one = need.num_nodes == 1
            where, each = ("node", "one node") if is_one else (f"{need.num_nodes} nodes", "each")
            return (
                f"no {where} can hold a {need.deployment} replica: it needs {need} on {each}; "
                f"{_offers(need, nodes, num_fit)}"
            )
    needed: defaultdict[str, float] = defaultdict(float)
    there: defaultdict[str, float] = defaultdict(float)
    for need in needs:
        _add(needed, need.resources, times=need.num_nodes)
    for node in nodes:
        _add(there, node.resources)
    short = {name: amount for name, amount in needed.items() if amount > there[name]}
    if short:
        has = f"{_count(nodes)} {'has' if len(nodes) == 1 else 'have'}"
        return (
            f"one replica of each deployment needs {amounts(short)} in all; {has} "
            f"{amounts({name: there[name] for name in short})}"
        )
    return None


def amounts(resources: Mapping[str, float]) -> str:
    """Resources in words, such as "2 GPUs, 0.5 CPUs"; those of which none is needed left out."""
    return ", ".join(
        f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}"
        for name, amount in resources.items()
        if amount or name == "CPU"
    )


def _add(total: defaultdict[str, float], resources: Mapping[str, float], *, times: int = 1) -> None:
    for name, amount in resources.items():
        total[name] += times * amount


def _fits(need: ReplicaNeeds, node: Node) -> bool:
    has_labels = all(_has(node.labels.get(key), value) for key, value in need.labels.items())
    return has_labels and all(
        node.resources.get(name, 0.0) >= amount for name, amount in need.resources.items()
    )


def _has(label: str | None, selector: str) -> bool:
    match = _SELECTOR.fullmatch(selector)
    if match is None:
        return False
    is_one = label in [value.strip() for value in match["values"].split(",")]
    return is_one != bool(match["no"])


def _offers(need: ReplicaNeeds, nodes: Sequence[Node], num_fit: int) -> str:
    most = {
        name: max((node.resources.get(name, 0.0) for node in nodes), default=0.0)
        for name, amount in need.resources.items()
    }
    lacking = {name: most[name] for name, amount in need.resources.items() if amount > most[name]}
    if lacking:
        told = ", ".join(f"{amount:g} {name}" for name, amount in lacking.items())
        return f"the most of {_count(nodes)} is {told}"
    return f"of {_count(nodes)} {num_fit or 'none'} has all of it"


def _count(nodes: Sequence[Node]) -> str:
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
