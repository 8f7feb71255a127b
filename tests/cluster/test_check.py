"""The report of `pdserve check`."""

from pathlib import Path

import pytest

from cluster.cli import main

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
"""
REPORT = """\
deployment  replicas  GPUs each  CPUs each  tensor parallel  placed on
router      1         0          0.25       -                any node
prefill     2         4          0.25       4                ray.io/accelerator-type=H100
decode      3         0          2          1                0.5 fast_nic

prefill engine  max_model_len=512, tensor_parallel_size=4
decode engine   max_model_len=512, 1 GiB of KV cache, OMP_NUM_THREADS=4
model           org/model, served as model
transfer        nixl over UCX
policy          p2c
needs           8 GPUs, 6.75 CPUs, 1.5 fast_nic
SLO             TTFT 0.5 s and ITL 0.05 s for 90 % of requests
URL             http://127.0.0.1:8100/v1
"""


def test_report_of_pools_that_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("replicas: 3", "max_replicas: 3"))
    assert main(["check", str(path)]) == 0
    report = capsys.readouterr().out
    assert "decode      1 to 3    0 " in report
    assert "needs           8 GPUs, 6.75 CPUs, 1.5 fast_nic at most\n" in report


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == REPORT
