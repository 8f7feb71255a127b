"""`pdserve check` on the example for GPUs, and on what one makes of it."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from build_for_gpus import WITHOUT_A_PLATFORM

from cluster import cli
from cluster.cli import main
from cluster.placement import Node

EXAMPLE = Path(__file__).parents[2] / "cluster/configs/llama-3.1-8b-2p4d.yaml"
HEAD = Node(resources={"CPU": 8.0}, labels={"zone": "front"})
EIGHT = Node(resources={"CPU": 96.0, "GPU": 8.0})
FOUR = Node(resources={"CPU": 48.0, "GPU": 4.0})


def unchanged(args: dict[str, Any]) -> None:
    pass


def tensor_parallel(args: dict[str, Any]) -> None:
    args["prefill"]["gpus"] = 2
    args["prefill"]["engine"]["tensor_parallel_size"] = 2


def pipeline_parallel(args: dict[str, Any]) -> None:
    args["engine"]["pipeline_parallel_size"] = 2
    args["prefill"]["gpus"] = args["decode"]["gpus"] = 2


def pipeline_parallel_over_nccl(args: dict[str, Any]) -> None:
    pipeline_parallel(args)
    args["transfer"] = {"connector": "nccl"}


def two_nodes(args: dict[str, Any]) -> None:
    sixteen_gpus(args)
    args["decode"]["nodes"] = 2
    args["decode"]["replicas"] = 1


def sixteen_gpus(args: dict[str, Any]) -> None:
    args["decode"]["gpus"] = 16
    args["decode"]["engine"]["tensor_parallel_size"] = 16


def two_nodes_of_vllm(args: dict[str, Any]) -> None:
    args["engine"]["nnodes"] = 2


def ranks_over_ray(args: dict[str, Any]) -> None:
    args["engine"]["distributed_executor_backend"] = "ray"


def data_parallel(args: dict[str, Any]) -> None:
    args["decode"]["engine"]["data_parallel_size"] = 2


def data_parallel_by_environment(args: dict[str, Any]) -> None:
    args["decode"]["env"] = {"VLLM_DP_SIZE": "2"}


def context_parallel(args: dict[str, Any]) -> None:
    args["engine"]["prefill_context_parallel_size"] = 2


def cpu_head(args: dict[str, Any]) -> None:
    args["router"]["labels"] = {"zone": "front"}


def speculative(args: dict[str, Any]) -> None:
    args["engine"]["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}


def speculative_in_decode(args: dict[str, Any]) -> None:
    args["decode"]["engine"]["speculative_config"] = {"method": "mtp"}


def adapters(args: dict[str, Any]) -> None:
    args["engine"] |= {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16}


def named_adapters(args: dict[str, Any]) -> None:
    adapters(args)
    args["router"]["frontend"] = {"lora_modules": [{"name": "a", "path": "/a"}]}


FITS = "nodes                each replica fits one of the 3 seen"
ROWS: list[tuple[Callable[[dict[str, Any]], None], Sequence[Node], int, Sequence[str]]] = [
    (unchanged, (), 0,
     ["prefill     2         1          2          1                any node with GPUs",
      "decode      4         1          2          1                any node with GPUs",
      "needs                6 GPUs, 14 CPUs"]),
    (unchanged, (HEAD, EIGHT, FOUR), 0, [FITS]),
    (tensor_parallel, (HEAD, EIGHT, FOUR), 0,
     ["prefill     2         2          2          2                any node with GPUs",
      "needs                8 GPUs, 14 CPUs",
      "one prefill replica  2 GPUs, 2 CPUs, on one node", FITS]),
    (pipeline_parallel, (), 2,
     ["prefill.engine.pipeline_parallel_size: 2 does not go with transfer.connector nixl, "]),
    (pipeline_parallel_over_nccl, (HEAD, EIGHT, FOUR), 0,
     ["prefill     2         2          2          1, 2 stages      any node with GPUs",
      "transfer             nccl", "needs                12 GPUs, 14 CPUs", FITS]),
    (sixteen_gpus, (), 0,
     ["nodes                not asked (see RAY_DASHBOARD_ADDRESS): a decode replica waits for "
      "ever unless one has 16 GPUs; few have more than 8. decode.nodes has its engine span "
      "several"]),
    (sixteen_gpus, (HEAD, EIGHT, EIGHT), 1,
     ["no node can hold a decode replica: it needs 16 GPUs, 2 CPUs on one node; the most of 3 "
      "nodes is 8 GPU"]),
    (two_nodes, (), 0,
     ["decode      1         2 x 8      2 x 1      16               any node with GPUs",
      "one prefill replica  1 GPU, 2 CPUs, on one node",
      "one decode replica   2 nodes x 8 GPUs, 1 CPU",
      "needs                18 GPUs, 8 CPUs",
      "placement            spread over nodes: Serve packs no replicas beside such as span them"]),
    (two_nodes, (HEAD, EIGHT, EIGHT, FOUR), 0,
     ["nodes                each replica fits some of the 4 seen"]),
    (two_nodes, (HEAD, EIGHT, FOUR), 1,
     ["no 2 nodes can hold a decode replica: it needs 8 GPUs, 1 CPU on each; of 3 nodes 1 has all "
      "of it"]),
    (two_nodes_of_vllm, (), 2,
     ["engine.nnodes: may not be set here: set nodes of the pool instead"]),
    (ranks_over_ray, (), 2,
     ["engine.distributed_executor_backend: ray would have ranks outside of the replica; "]),
    (data_parallel, (), 2,
     ["decode.engine.data_parallel_size: may not be set here: raise the pool's replicas instead"]),
    (data_parallel_by_environment, (), 2,
     ["decode.env.VLLM_DP_SIZE: may not be set here: raise the pool's replicas instead"]),
    (context_parallel, (), 2,
     ["engine.prefill_context_parallel_size: may not be set here: "]),
    (cpu_head, (HEAD, EIGHT, FOUR), 0,
     ["router      2         0          1          -                zone=front", FITS]),
    (cpu_head, (EIGHT, FOUR), 1,
     ["no node can hold a router replica: it needs 1 CPU and zone=front on one node; of 2 nodes "
      "none has all of it"]),
    (unchanged, (HEAD,), 1,
     ["no node can hold a prefill replica: it needs 1 GPU, 2 CPUs on one node; the most of 1 node "
      "is 0 GPU"]),
    (speculative, (HEAD, EIGHT, FOUR), 0,
     ["speculative_config={'method': 'mtp', 'num_speculative_tokens': 1}", FITS]),
    (speculative_in_decode, (), 2,
     ["engine.speculative_config: a draft with weights has KV of its own, so both pools have the"]),
    (adapters, (HEAD, EIGHT, FOUR), 0,
     ["enable_lora=True", "max_loras=4", FITS,
      "adapters             engines keep memory for them, but routers cannot load any: no request "
      "has one"]),
    (named_adapters, (), 2,
     ["router.frontend.lora_modules: may not be set here: the router cannot load adapters"]),
]  # fmt: skip


def written(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = copy.deepcopy(yaml.safe_load(EXAMPLE.read_text()))
    change(document["applications"][0]["args"])
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("change", "nodes", "status", "parts"),
    ROWS,
    ids=[f"{row[0].__name__}-{len(row[1])}-nodes" for row in ROWS],
)
def test_check_of_a_variant(
    change: Callable[[dict[str, Any]], None],
    nodes: Sequence[Node],
    status: int,
    parts: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "seen_nodes", lambda: nodes)
    assert main(["check", str(written(tmp_path, change))]) == status
    out, err = capsys.readouterr()
    told = err if status else out
    assert (status == 2) == (out == "")
    assert [part for part in parts if part not in told] == []


def test_check_on_a_head_without_a_gpu_and_with_the_build_for_gpus(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_A_PLATFORM)
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    told = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "check", str(written(tmp_path, unchanged))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert "needs                6 GPUs, 14 CPUs\n" in told.stdout
