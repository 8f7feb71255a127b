"""Deploys configs on a Ray cluster of its own whose nodes and GPUs exist by name only.

`python tests/cluster/fake_nodes.py CONFIG ...`: one after the other, on two nodes of eight GPUs
beside a head without any. The deployments are the application's own; stand-ins take the place of
what they would run. Prints JSON, a line for each: the replicas that run, by deployment, and the
GPUs in use on each node.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray._private.state import available_resources_per_node, total_resources_per_node
from ray.cluster_utils import Cluster
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from cluster.app import build

SETTLED_AFTER_S = 20.0
"""Without a change; all replicas take a few seconds."""
TIMEOUT_S = 150.0


@contextmanager
def fake_nodes() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="fake-nodes-", dir="/tmp") as folder:
        # Of its own, so that it tells no other program on this machine about itself: in it goes the
        # address too, which Ray writes below the default folder, whether that is there or not.
        os.environ["RAY_TMPDIR"] = folder
        (Path(folder) / "ray").mkdir()
        head = {"num_cpus": 4, "num_gpus": 0, "temp_dir": folder, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=4, num_gpus=8, temp_dir=folder)
            ray.init(cluster.address, namespace="serve", log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def stand_in() -> type:
    class StandIn:
        """Made here so that it travels as it is: replicas cannot import this file."""

        def __init__(self, *_: object) -> None:
            pass

    return StandIn


def hollow(application: serve.Application) -> serve.Application:
    """The same deployments with nothing in them."""
    deployment = application._bound_deployment
    inner = [each for each in deployment.init_args if isinstance(each, serve.Application)]
    options: dict[str, Any] = {"func_or_class": stand_in()}
    return deployment.options(**options).bind(*(hollow(each) for each in inner))


def deploy(schema: ServeDeploySchema) -> dict[str, Any]:
    """Starts Serve as `serve run` does, and waits until all replicas run or no more come."""
    (application,) = schema.applications
    serve.start(http_options={"location": "NoServer"}, controller_options=schema.controller_options)
    serve._run(hollow(build(application.args)), name=application.name, _blocking=False)
    before: dict[str, int] = {}
    changed_s, ends_s = time.monotonic(), time.monotonic() + TIMEOUT_S
    while True:
        status = serve.status().applications[application.name]
        running = {
            name: each.replica_states.get("RUNNING", 0) for name, each in status.deployments.items()
        }
        now_s = time.monotonic()
        if running != before:
            before, changed_s = running, now_s
        stands_still = any(running.values()) and now_s - changed_s > SETTLED_AFTER_S
        if status.status == ApplicationStatus.RUNNING or stands_still or now_s > ends_s:
            return {"running": running, "gpus_used": gpus_used()}
        time.sleep(0.5)


def gpus_used() -> list[float]:
    """Of each node that has some."""
    free = available_resources_per_node()
    return sorted(
        total["GPU"] - free[node_id].get("GPU", 0.0)
        for node_id, total in total_resources_per_node().items()
        if "GPU" in total
    )


if __name__ == "__main__":
    with fake_nodes():
        for path in sys.argv[1:]:
            schema = ServeDeploySchema(**yaml.safe_load(Path(path).read_text()))
            print(json.dumps(deploy(schema)), flush=True)
            serve.delete(schema.applications[0].name)
            while any(gpus_used()):
                time.sleep(0.2)
