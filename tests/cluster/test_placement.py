"""Which replicas fit which nodes, and what is said where none does."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import ray

from cluster.config import parse_args
from cluster.nodes import (
    known_dashboard,
    observe_nodes,
    read_nodes,
    read_own_nodes,
    unplaceable,
    warn_of_what_waits,
)
from cluster.placement import Node, ReplicaNeeds, placement_problem, replica_needs

NOTHING_ELSE = {"CPU": 0.25}
LARGE = Node(resources={"CPU": 64.0, "GPU": 8.0, "nic": 1.0}, labels={"rack": "a", "gpu": "H100"})
SMALL = Node(resources={"CPU": 4.0})


def need(
    resources: dict[str, float], labels: dict[str, str] | None = None, num_nodes: int = 1
) -> ReplicaNeeds:
    return ReplicaNeeds(
        deployment="decode", resources=resources, labels=labels or {}, num_nodes=num_nodes
    )


ROWS = [
    ("fits", [need({"GPU": 8, "CPU": 1})], [SMALL, LARGE], None),
    ("too-many-gpus", [need({"GPU": 16, "CPU": 1})], [LARGE, LARGE],
     "no node can hold a decode replica: it needs 16 GPUs, 1 CPU on one node; the most of 2 nodes "
     "is 8 GPU"),
    ("no-gpus", [need({"GPU": 1, "CPU": 1})], [SMALL],
     "no node can hold a decode replica: it needs 1 GPU, 1 CPU on one node; the most of 1 node is "
     "0 GPU"),
    ("too-many-cpus", [need({"CPU": 65})], [LARGE], "the most of 1 node is 64 CPU"),
    ("custom", [need({"CPU": 1, "nic": 2})], [LARGE], "the most of 1 node is 1 nic"),
    ("not-on-one-node", [need({"CPU": 60, "ssd": 1})],
     [LARGE, Node(resources={"CPU": 1, "ssd": 1})], "of 2 nodes none has all of it"),
    ("label", [need(NOTHING_ELSE, {"rack": "a"})], [SMALL, LARGE], None),
    ("no-such-label", [need(NOTHING_ELSE, {"rack": "b"})], [SMALL, LARGE],
     "it needs 0.25 CPUs and rack=b on one node; of 2 nodes none has all of it"),
    ("label-in", [need(NOTHING_ELSE, {"rack": "in(b, a)"})], [LARGE], None),
    ("label-not", [need(NOTHING_ELSE, {"rack": "!a"})], [LARGE], "and rack=!a on one node"),
    ("label-not-there", [need(NOTHING_ELSE, {"rack": "!a"})], [SMALL], None),
    ("label-not-in", [need(NOTHING_ELSE, {"rack": "!in(b,c)"})], [LARGE], None),
    ("label-on-a-node-too-small", [need({"CPU": 2}, {"rack": "b"})],
     [LARGE, Node(resources={"CPU": 1.0}, labels={"rack": "b"})], "of 2 nodes none has all of it"),
    ("each-but-not-all", [need({"CPU": 3}), need({"CPU": 3})], [SMALL],
     "one replica of each deployment needs 6 CPUs in all; 1 node has 4 CPUs"),
    ("two-nodes", [need({"GPU": 8, "CPU": 1}, num_nodes=2)], [SMALL, LARGE, LARGE], None),
    ("two-nodes-of-which-one", [need({"GPU": 8, "CPU": 1}, num_nodes=2)], [SMALL, LARGE],
     "no 2 nodes can hold a decode replica: it needs 8 GPUs, 1 CPU on each; of 2 nodes 1 has all "
     "of it"),
    ("two-nodes-of-which-none", [need({"GPU": 9, "CPU": 1}, num_nodes=2)], [LARGE, LARGE],
     "it needs 9 GPUs, 1 CPU on each; the most of 2 nodes is 8 GPU"),
    ("two-nodes-with-a-label", [need(NOTHING_ELSE, {"rack": "a"}, 2)], [LARGE, SMALL],
     "it needs 0.25 CPUs and rack=a on each; of 2 nodes 1 has all of it"),
    ("two-nodes-and-another", [need({"CPU": 3}, num_nodes=2), need({"CPU": 3})], [SMALL, SMALL],
     "one replica of each deployment needs 9 CPUs in all; 2 nodes have 8 CPUs"),
    ("each-on-its-own-node", [need({"CPU": 3}), need({"CPU": 3})], [SMALL, SMALL], None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "nodes", "part"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_placement_problem(needs: list[ReplicaNeeds], nodes: list[Node], part: str | None) -> None:
    problem = placement_problem(needs, nodes)
    if part is None:
        assert problem is None
    else:
        assert problem is not None
        assert part in problem


def test_labels_are_told_to_ray_without_spaces() -> None:
    """Which would look for the space as well, and a replica would wait for ever."""
    config = parse_args({"decode": {"labels": {"rack": "in(a, b,  c)"}}})
    assert config.decode.labels == {"rack": "in(a,b,c)"}


def test_needs_of_a_config() -> None:
    config = parse_args(
        {
            "router": {"cpus": 2, "labels": {"rack": "b"}, "resources": {"front": 1}},
            "prefill": {"gpus": 2, "engine": {"tensor_parallel_size": 2}, "labels": {"rack": "a"}},
            "decode": {
                "nodes": 2,
                "gpus": 16,
                "cpus": 1,
                "resources": {"nic": 2},
                "engine": {"tensor_parallel_size": 16},
            },
        }
    )
    assert [each.shape for each in replica_needs(config)] == [
        "2 CPUs, 1 front and rack=b, on one node",
        "2 GPUs, 0.25 CPUs and rack=a, on one node",
        "2 nodes x 8 GPUs, 0.5 CPUs, 1 nic",
    ]


ANSWER: dict[str, Any] = {
    "result": True,
    "data": {
        "result": {
            "result": [
                {"state": "ALIVE", "resources_total": {"CPU": 2.0}, "labels": {"rack": "a"}},
                {"state": "DEAD", "resources_total": {"CPU": 9.0}, "labels": None},
            ]
        }
    },
}


@pytest.mark.parametrize(
    ("answer", "nodes"),
    [
        pytest.param(ANSWER, (Node(resources={"CPU": 2.0}, labels={"rack": "a"}),), id="alive"),
        pytest.param({"data": {"result": {"result": []}}}, (), id="none-registered"),
        pytest.param({"result": False, "data": None}, (), id="no-data"),
    ],
)
def test_read_nodes(answer: dict[str, Any], nodes: tuple[Node, ...]) -> None:
    assert read_nodes(answer) == nodes


@pytest.fixture
def dashboard_url() -> Iterator[str]:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that the standard library calls
            self.send_response(200 if self.path == "/api/v0/nodes" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(ANSWER).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_cluster_that_is_too_small_is_told(dashboard_url: str) -> None:
    gpus = {"gpus": 16, "engine": {"tensor_parallel_size": 16}}
    problem = unplaceable(parse_args({"prefill": gpus}), dashboard_url)
    assert problem is not None
    assert problem.startswith("no node can hold a prefill replica: it needs 16 GPUs, 0.25 CPUs")
    assert unplaceable(parse_args({}), dashboard_url) is None


def test_nobody_who_answers_is_no_reason() -> None:
    assert observe_nodes("http://127.0.0.1:9") == ()
    assert unplaceable(parse_args({"prefill": {"cpus": 999}}), "http://127.0.0.1:9") is None


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, None),
        ({"RAY_DASHBOARD_ADDRESS": "http://head:8265/"}, "http://head:8265"),
        ({"RAY_API_SERVER_ADDRESS": "http://head:8265"}, "http://head:8265"),
        ({"RAY_DASHBOARD_ADDRESS": "ray://head:10001"}, None),
    ],
)
def test_the_cluster_that_the_shell_talks_to(environment: dict[str, str], url: str | None) -> None:
    assert known_dashboard(environment) == url


OWN = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 8.0}, "Labels": {"rack": "a"}},
    {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}, "Labels": None},
]


def test_nodes_of_the_cluster_that_we_are_of() -> None:
    assert read_own_nodes(OWN) == (Node(resources={"CPU": 8, "GPU": 8}, labels={"rack": "a"}),)


@pytest.mark.parametrize(
    ("gpus", "is_member", "warnings"),
    [
        (8, True, []),
        (16, False, []),
        (16, True, [
            "no node can hold a prefill replica: it needs 16 GPUs, 0.25 CPUs on one node; the most "
            "of 1 node is 8 GPU; it waits until the cluster has such nodes"
        ]),
    ],
    ids=["fits", "no-cluster", "too-large"],
)  # fmt: skip
def test_a_start_says_what_will_wait(
    gpus: int,
    is_member: bool,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: is_member)
    monkeypatch.setattr(ray, "nodes", lambda: OWN)
    pool = {"gpus": gpus, "engine": {"tensor_parallel_size": gpus}}
    logger = logging.getLogger("ray.serve.pdserve")
    logger.addHandler(caplog.handler)  # Ray's own loggers pass nothing on
    warn_of_what_waits(parse_args({"prefill": pool}))
    logger.removeHandler(caplog.handler)
    assert list(dict.fromkeys(caplog.messages)) == warnings
