"""What a config would run, and where: the report of `pdserve check`.

Owns the text of that report. Never starts or contacts anything.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import printable, shortened
from cluster.placement import Node, placement_problem, replica_needs
from cluster.sections import PoolConfig, RouterConfig
from cluster.serve_file import ServeFile
from kvtransfer.phase import PHASES, Phase

_HEADINGS = ("deployment", "replicas", "GPUs each", "CPUs each", "tensor parallel", "placed on")


MAX_CELL = 400
"""Characters of a value in the report."""
MOST_GPUS = 8
"""Of a usual node."""


def describe(file: ServeFile, nodes: Sequence[Node] = ()) -> str:
    """The deployments of a config, what they need, and where they will be reached.

    `nodes` are those of the cluster that would run it, where one could be asked.
    """
    config = file.config
    lines = [
        *_table([_HEADINGS, _router_row(config), *(_pool_row(config, name) for name in PHASES)]),
        "",
        *_table(
            [
                *((f"{name} engine", _options(config, name)) for name in PHASES),
                ("model", f"{config.model}, served as {config.public_name}"),
                ("transfer", _transfer(config)),
                ("policy", config.router.policy),
                ("needs", _totals(config)),
                *(
                    (f"one {need.deployment} replica", need.shape)
                    for need in replica_needs(config)
                    if need.deployment != "router"
                ),
                *([("nodes", _placement(config, nodes))] if nodes else _unasked(config)),
                *_without_effect(config),
                *_room(file),
                ("SLO", _slo(config)),
                ("URL", f"{file.url}/v1"),
            ]
        ),
    ]
    return "\n".join(lines)


def _router_row(config: ClusterConfig) -> tuple[str, ...]:
    router = config.router
    return ("router", str(router.replicas), "0", f"{router.cpus:g}", "-", _places(router))


def _pool_row(config: ClusterConfig, name: Phase) -> tuple[str, ...]:
    pool = config.pool(name)
    ranks = config.parallelism(name)
    stages = f", {ranks.pipeline} stages" if ranks.pipeline > 1 else ""
    return (
        name,
        _size(config, name),
        _each(pool, pool.gpus),
        _each(pool, pool.cpus),
        f"{ranks.tensor}{stages}",
        _places(pool, "any node with GPUs" if pool.gpus else "any node"),
    )


def _each(pool: PoolConfig, amount: float) -> str:
    """Of one replica, as its nodes have it."""
    return f"{pool.nodes} x {amount / pool.nodes:g}" if pool.nodes > 1 else f"{amount:g}"


def _places(section: PoolConfig | RouterConfig, anywhere: str = "any node") -> str:
    places = [f"{key}={value}" for key, value in section.labels.items()]
    places += [f"{amount:g} {resource}" for resource, amount in section.resources.items()]
    return ", ".join(places) or anywhere


def _size(config: ClusterConfig, name: Phase) -> str:
    limits = config.limits(name)
    if limits.min_replicas == limits.max_replicas:
        return str(limits.max_replicas)
    return f"{limits.min_replicas} to {limits.max_replicas}"


def _options(config: ClusterConfig, name: Phase) -> str:
    pool = config.pool(name)
    parts = _assignments(config.pool_engine(name))
    if not pool.gpus:
        parts.append(f"{pool.kv_cache_gib:g} GiB of KV cache")
    return ", ".join([*parts, *_assignments(pool.env)]) or "vLLM's defaults"


def _assignments(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


def _totals(config: ClusterConfig) -> str:
    pools = [config.pool(name) for name in PHASES]
    sizes = [config.limits(name).max_replicas for name in PHASES]
    gpus = sum(size * pool.gpus for size, pool in zip(sizes, pools, strict=True))
    cpus = 0.0
    custom: defaultdict[str, float] = defaultdict(float)
    sections: list[PoolConfig | RouterConfig] = [*pools, config.router]
    for size, each in zip([*sizes, config.router.replicas], sections, strict=True):
        cpus += size * each.cpus
        for resource, amount in each.resources.items():
            custom[resource] += size * amount
    parts = [f"{gpus} GPU{'' if gpus == 1 else 's'}", f"{cpus:g} CPUs"]
    parts += [f"{amount:g} {resource}" for resource, amount in custom.items()]
    at_most = " at most" if config.scales else ""
    budget = f", within gpu_budget {config.gpu_budget}" if config.gpu_budget else ""
    return ", ".join(parts) + at_most + budget


def _transfer(config: ClusterConfig) -> str:
    transfer = config.transfer
    if transfer.connector == "nixl":
        return f"nixl over {', '.join(transfer.backends)}"
    if any(pool.gpus for pool in (config.prefill, config.decode)):
        return "nccl, experimental between GPUs: none has run it yet"
    return "nccl, over Gloo between CPUs"


def _placement(config: ClusterConfig, nodes: Sequence[Node]) -> str:
    problem = placement_problem(replica_needs(config), nodes)
    if problem is not None:
        return problem
    spans = any(config.pool(name).nodes > 1 for name in PHASES)
    return f"each replica fits {'some' if spans else 'one'} of the {len(nodes)} seen"


def _unasked(config: ClusterConfig) -> list[tuple[str, str]]:
    each = {name: config.pool(name).resources_per_node["GPU"] for name in PHASES}
    return [
        (
            "nodes",
            f"not asked (see RAY_DASHBOARD_ADDRESS): a {name} replica waits for ever unless one "
            f"has {gpus:g} GPUs; few have more than {MOST_GPUS}. {name}.nodes has its engine span "
            "several",
        )
        for name, gpus in each.items()
        if gpus > MOST_GPUS
    ]


def _without_effect(config: ClusterConfig) -> list[tuple[str, str]]:
    if not config.pool_engine("decode").get("enable_lora"):
        return []
    return [
        (
            "adapters",
            "engines keep memory for them, but routers cannot load any: no request has one",
        )
    ]


def _room(file: ServeFile) -> list[tuple[str, str]]:
    if all(file.config.pool(name).gpus < 2 for name in PHASES):
        return []
    if file.packs_replicas and any(file.config.pool(name).nodes > 1 for name in PHASES):
        return [
            ("placement", "spread over nodes: Serve packs no replicas beside such as span them")
        ]
    if file.packs_replicas:
        return [("placement", "one node after the other, the largest replicas first")]
    return [
        (
            "placement",
            "spread over nodes; a large replica may find no room (see docs/deployment.md)",
        )
    ]


def _slo(config: ClusterConfig) -> str:
    slo = config.slo
    return f"TTFT {slo.ttft_s:g} s and ITL {slo.itl_s:g} s for {slo.percentile:g} % of requests"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[shortened(printable(cell), MAX_CELL) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
