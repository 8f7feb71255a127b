"""Serve config files: the shipped ones, and wrong ones through the command itself."""

from pathlib import Path

import pytest

from cluster.cli import main
from cluster.serve_file import load_config, load_serve_file

CONFIGS = Path(__file__).parents[2] / "cluster" / "configs"

APPLICATION = "import_path: cluster.app:build"
WRONG = [
    ("yaml", "applications: [", "is not YAML: line 1, column 16: expected the node content"),
    ("not-a-mapping", "- 1",
     "is not a Serve config file: a mapping with applications is expected"),
    ("no-application", "http_options: {}", "applications: field required"),
    ("empty", "applications: []", "applications: 0 are listed, must be one"),
    ("two", f"applications: [{{{APPLICATION}}}, {{{APPLICATION}, name: b}}]",
     "applications: 2 are listed, must be one"),
    ("top-level", f"http_option: {{}}\napplications: [{{{APPLICATION}}}]",
     "http_option: no such field; did you mean http_options?"),
    ("http", f"http_options: {{prot: 1}}\napplications: [{{{APPLICATION}}}]",
     "http_options.prot: no such field; did you mean port?"),
    ("port", f"http_options: {{port: http}}\napplications: [{{{APPLICATION}}}]",
     "http_options.port: 'http' is not a whole number"),
    ("port-range", f"http_options: {{port: 70000}}\napplications: [{{{APPLICATION}}}]",
     "http_options.port: 70000 is not between 1 and 65535"),
    ("application", f"applications: [{{{APPLICATION}, arg: {{}}}}]",
     "applications.0.arg: no such field; did you mean args?"),
    ("import-path", "applications: [{import_path: 'app:app'}]",
     "applications.0.import_path: 'app:app' is not cluster.app:build"),
    ("route", f"applications: [{{{APPLICATION}, route_prefix: null}}]",
     "applications.0.route_prefix: null is not a path such as /"),
    ("args", f"applications: [{{{APPLICATION}, args: {{router: {{policy: p3c}}}}}}]",
     "router.policy: 'p3c' is not one of p2c, least_work, round_robin, random"),
    ("engine", f"applications: [{{{APPLICATION}, args: {{engine: {{max-model-len: 1}}}}}}]",
     "engine.max-model-len: vLLM has no such engine option; did you mean max_model_len?"),
    ("engine-type",
     f"applications: [{{{APPLICATION}, args: {{decode: {{engine: {{max_num_seqs: many}}}}}}}}]",
     "decode.engine.max_num_seqs: 'many' is not a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
@pytest.mark.parametrize("command", ["check", "up"])
def test_wrong_file_ends_with_one_line(
    command: str, text: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert main([command, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"pdserve: {path}: {line}")
    assert err.count("\n") == 1


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.yaml"
    assert main(["check", str(path)]) == 2
    assert capsys.readouterr().err == f"pdserve: {path}: No such file or directory\n"


@pytest.mark.parametrize("name", ["demo.yaml", "tiny.yaml", "llama-3.1-8b-2p4d.yaml"])
def test_shipped_config_is_valid(name: str) -> None:
    load_config(CONFIGS / name)


@pytest.mark.parametrize("name", ["demo.yaml", "tiny.yaml"])
def test_demo_is_served_on_this_machine_only(name: str) -> None:
    file = load_serve_file(CONFIGS / name)
    assert file.host == "127.0.0.1"
    assert file.url == "http://127.0.0.1:8000"
    assert [file.config.prefill.gpus, file.config.decode.gpus] == [0, 0]


@pytest.mark.parametrize("name", ["demo.yaml", "tiny.yaml"])
def test_demo_moves_kv_by_nixl(name: str) -> None:
    transfer = load_config(CONFIGS / name).transfer
    assert (transfer.connector, transfer.shared_memory) == ("nixl", "never")


def test_llama_uses_six_gpus() -> None:
    config = load_config(CONFIGS / "llama-3.1-8b-2p4d.yaml")
    pools = [config.prefill, config.decode]
    assert [(pool.replicas, pool.gpus) for pool in pools] == [(2, 1), (4, 1)]


def test_url_has_the_route_prefix(tmp_path: Path) -> None:
    path = tmp_path / "prefix.yaml"
    path.write_text(
        "http_options: {host: 0.0.0.0, port: 81}\n"
        f"applications: [{{{APPLICATION}, route_prefix: /llm}}]"
    )
    assert load_serve_file(path).url == "http://127.0.0.1:81/llm"
