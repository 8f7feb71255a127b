"""Large replicas find room beside small ones, on a Ray cluster of fake nodes with fake GPUs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "cluster" / "configs" / "llama-3.1-8b-2p4d.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The example for GPUs, with four prefills of two GPUs and one decode of eight."""
    document: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    (application,) = document["applications"]
    for pool, replicas, gpus in (("prefill", 4, 2), ("decode", 1, 8)):
        options = application["args"][pool]
        options |= {"replicas": replicas, "gpus": gpus, "cpus": 0.25}
        options["engine"]["tensor_parallel_size"] = gpus
    application["args"]["router"] |= {"replicas": 1, "cpus": 0.25}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_prefills_leave_a_node_to_a_decode_that_needs_a_whole_one(config: Path) -> None:
    placed = subprocess.run(
        [sys.executable, str(HERE / "fake_nodes.py"), str(config)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert json.loads(placed.stdout.splitlines()[-1]) == {
        "running": {"prefill": 4, "decode": 1, "router": 1},
        "gpus_used": [8.0, 8.0],
    }
