"""Large replicas find room beside small ones, on a Ray cluster of fake nodes with fake GPUs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "cluster" / "configs" / "llama-3.1-8b-2p4d.yaml"


def config(path: Path, *, decode_nodes: int = 1, **pools: tuple[int, int]) -> Path:
    """The example for GPUs, with so many replicas of so many GPUs each."""
    document: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    (application,) = document["applications"]
    for name, (replicas, gpus) in pools.items():
        options = application["args"][name]
        options |= {"replicas": replicas, "gpus": gpus, "cpus": 0.25}
        options["engine"]["tensor_parallel_size"] = gpus
    application["args"]["decode"]["nodes"] = decode_nodes
    application["args"]["router"] |= {"replicas": 1, "cpus": 0.25}
    path.write_text(yaml.safe_dump(document))
    return path


def test_large_replicas_find_room(tmp_path: Path) -> None:
    configs = [
        # Two prefills on each node would leave none to a decode that needs a whole one.
        config(tmp_path / "4p1d.yaml", prefill=(4, 2), decode=(1, 8)),
        # Two prefills on one node would leave the other to two decodes, of which it holds one.
        config(tmp_path / "2p2d.yaml", prefill=(2, 2), decode=(2, 6)),
        # No node has twelve.
        config(tmp_path / "two-nodes.yaml", prefill=(1, 2), decode=(1, 12), decode_nodes=2),
    ]
    placed = subprocess.run(
        [sys.executable, str(HERE / "fake_nodes.py"), *map(str, configs)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [json.loads(line) for line in placed.stdout.splitlines() if line.startswith("{")]
    full = [8.0, 8.0]
    assert lines == [
        {"running": {"prefill": 4, "decode": 1, "router": 1}, "gpus_used": full},
        {"running": {"prefill": 2, "decode": 2, "router": 1}, "gpus_used": full},
        {"running": {"prefill": 1, "decode": 1, "router": 1}, "gpus_used": [6.0, 8.0]},
    ]
