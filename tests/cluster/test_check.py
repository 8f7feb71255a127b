"""The report of `pdserve check`."""

from pathlib import Path

import pytest

from cluster.check import describe
from cluster.cli import main
from cluster.placement import Node
from cluster.serve_file import load_serve_file

CONFIG = """\
http_options: {host: 127.0.0.1, port: 8100}
applications:
  - import_path: cluster.app:build
    args:
      model: org/model
      served_name: model
      engine: {max_model_len: 512}
      prefill:
        replicas: 2
        gpus: 4
        engine: {tensor_parallel_size: 4}
        labels: {ray.io/accelerator-type: H100}
      decode:
        replicas: 3
        cpus: 2
        resources: {fast_nic: 0.5}
        env: {OMP_NUM_THREADS: "4"}
      router:
        replicas: 2
        labels: {zone: front}
        resources: {fast_nic: 0.25}
"""
REPORT = """\
deployment  replicas  GPUs each  CPUs each  tensor parallel  placed on
router      2         0          0.25       -                zone=front, 0.25 fast_nic
prefill     2         4          0.25       4                ray.io/accelerator-type=H100
decode      3         0          2          1                0.5 fast_nic

prefill engine       max_model_len=512, tensor_parallel_size=4
decode engine        max_model_len=512, 1 GiB of KV cache, OMP_NUM_THREADS=4
model                org/model, served as model
transfer             nixl over UCX
policy               p2c
needs                8 GPUs, 7 CPUs, 2 fast_nic
one prefill replica  4 GPUs, 0.25 CPUs and ray.io/accelerator-type=H100, on one node
one decode replica   2 CPUs, 0.5 fast_nic, on one node
placement            spread over nodes; a large replica may find no room (see docs/deployment.md)
SLO                  TTFT 0.5 s and ITL 0.05 s for 90 % of requests
URL                  http://127.0.0.1:8100/v1
"""


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("gpus", "line"),
    [
        (8.0, "no node can hold a prefill replica: it needs 16 GPUs, 0.25 CPUs on one node; the "
              "most of 2 nodes is 8 GPU"),
        (16.0, "each replica fits one of the 2 seen"),
    ],
)  # fmt: skip
def test_report_of_nodes_that_were_seen(gpus: float, line: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    pool = "{gpus: 16, engine: {tensor_parallel_size: 16}}"
    path.write_text(
        f"applications: [{{import_path: cluster.app:build, args: {{prefill: {pool}}}}}]"
    )
    nodes = [Node(resources={"CPU": 64.0, "GPU": gpus})] * 2
    assert f"nodes                {line}" in describe(load_serve_file(path), nodes).splitlines()


def test_report_is_printable_and_not_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "applications: [{import_path: cluster.app:build, args: {connector: nccl}}]".replace(
            "{connector: nccl}",
            '{prefill: {env: {B: "a\\eb", A: "' + "x" * 9000 + '"}}}',
        )
    )
    assert main(["check", str(path)]) == 0
    report = capsys.readouterr().out
    assert "B=a\\x1bb, A=xxx" in report
    assert max(map(len, report.splitlines())) < 500


@pytest.mark.parametrize(
    ("options", "gpus", "line"),
    [
        ("", 2, "spread over nodes; a large replica may find no room ("),
        ("", 1, None),
        ("controller_options: {}\n", 2, "spread over nodes"),
        (
            "controller_options:\n  runtime_env:\n    env_vars:\n"
            '      RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY: "1"\n',
            2,
            "one node after the other, the largest replicas first",
        ),
    ],
)
def test_report_says_how_large_replicas_find_room(
    options: str, gpus: int, line: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    pool = f"{{gpus: {gpus}, engine: {{tensor_parallel_size: {gpus}}}}}"
    path.write_text(
        f"{options}applications: [{{import_path: cluster.app:build, args: {{prefill: {pool}}}}}]"
    )
    report = describe(load_serve_file(path))
    if line is None:
        assert "placement " not in report
    else:
        assert f"placement            {line}" in report


@pytest.mark.parametrize(
    ("gpus", "line"),
    [
        (1, "transfer             nccl, experimental between GPUs: none has run it yet\n"),
        (0, "transfer             nccl, over Gloo between CPUs\n"),
    ],
)
def test_report_of_a_connector_without_backends(
    gpus: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("served_name: model", "transfer: {connector: nccl}").replace(
        "gpus: 4\n        engine: {tensor_parallel_size: 4}", f"gpus: {gpus}"))  # fmt: skip
    assert main(["check", str(path)]) == 0
    assert line in capsys.readouterr().out


def test_report_of_pools_that_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("replicas: 3", "max_replicas: 3"))
    assert main(["check", str(path)]) == 0
    report = capsys.readouterr().out
    assert "decode      1 to 3    0 " in report
    assert "needs                8 GPUs, 7 CPUs, 2 fast_nic at most\n" in report


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == REPORT
