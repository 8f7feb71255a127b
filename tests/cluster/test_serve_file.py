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
    ("port-bool", f"http_options: {{port: yes}}\napplications: [{{{APPLICATION}}}]",
     "http_options.port: True is not a whole number"),
    ("port-text", f"http_options: {{port: '80'}}\napplications: [{{{APPLICATION}}}]",
     "http_options.port: '80' is not a whole number"),
    ("port-fraction", f"http_options: {{port: 80.0}}\napplications: [{{{APPLICATION}}}]",
     "http_options.port: 80.0 is not a whole number"),
    ("keep-alive-bool", f"http_options: {{keep_alive_timeout_s: on}}\napplications: "
     f"[{{{APPLICATION}}}]", "http_options.keep_alive_timeout_s: True is not a whole number"),
    ("host-empty", f"http_options: {{host: ''}}\napplications: [{{{APPLICATION}}}]",
     "http_options.host: '' is not an address of this machine, such as 127.0.0.1, or 0.0.0.0 "),
    ("host-blank", f"http_options: {{host: ' '}}\napplications: [{{{APPLICATION}}}]",
     "http_options.host: ' ' is not an address of this machine"),
    ("host-url", f"http_options: {{host: 'http://a'}}\napplications: [{{{APPLICATION}}}]",
     "http_options.host: 'http://a' is not an address of this machine"),
    ("host-digits", f"http_options: {{host: 999.1.1.1}}\napplications: [{{{APPLICATION}}}]",
     "http_options.host: '999.1.1.1' is not an address of this machine"),
    ("timeout", f"http_options: {{request_timeout_s: -5}}\napplications: [{{{APPLICATION}}}]",
     "http_options.request_timeout_s: -5 is not at least 0.001"),
    ("root-path", f"http_options: {{root_path: api}}\napplications: [{{{APPLICATION}}}]",
     "http_options.root_path: 'api' is not a path like /llm"),
    ("name", f"applications: [{{{APPLICATION}, name: 'a#b'}}]",
     "applications.0.name: 'a#b' is not letters, digits, and . _ -"),
    ("runtime-env", f"applications: [{{{APPLICATION}, runtime_env: {{env_vars: {{A: 1}}}}}}]",
     "applications.0.runtime_env: "),
    ("host-null", f"http_options: {{host: null}}\napplications: [{{{APPLICATION}}}]",
     "http_options.host: None is not a text"),
    ("tls", f"http_options: {{ssl_certfile: a, ssl_keyfile: b}}\napplications: [{{{APPLICATION}}}]",
     "http_options.ssl_certfile: may not be set here: HAProxy speaks plain HTTP here"),
    ("disabled", f"proxy_location: Disabled\napplications: [{{{APPLICATION}}}]",
     "proxy_location: Disabled leaves nobody to answer; must be EveryNode or HeadOnly"),
    ("capacity", f"target_capacity: 50\napplications: [{{{APPLICATION}}}]",
     "target_capacity: may not be set here: set the sizes of the pools in args instead"),
    ("grpc", f"grpc_options: {{prot: 1}}\napplications: [{{{APPLICATION}}}]",
     "grpc_options.prot: no such field"),
    ("deployments", f"applications: [{{{APPLICATION}, deployments: "
     "[{name: prefill, num_replicas: 5}]}]",
     "applications.0.deployments: may not be set here: set sizes and resources of the pools in"),
    ("application-port", f"applications: [{{{APPLICATION}, port: 9000}}]",
     "applications.0.port: may not be set here: set http_options.port instead"),
    ("external-scaler", f"applications: [{{{APPLICATION}, external_scaler_enabled: true}}]",
     "applications.0.external_scaler_enabled: may not be set here: set max_replicas"),
    ("logging-field", f"applications: [{{{APPLICATION}, logging_config: {{level: 1}}}}]",
     "applications.0.logging_config.level: no such field"),
    ("twice", f"applications: [{{{APPLICATION}}}]\napplications: []",
     "is not YAML: line 2, column 1: applications stands in line 1 as well"),
    ("deep", "[" * 3000, "is not YAML: line 1, column 33: nested more than 32 deep"),
    ("route-relative", f"applications: [{{{APPLICATION}, route_prefix: api}}]",
     "applications.0.route_prefix: Invalid route_prefix 'api', must start with a forward slash"),
    ("route-slash", f"applications: [{{{APPLICATION}, route_prefix: /api/}}]",
     "applications.0.route_prefix: Invalid route_prefix '/api/', may not end with a trailing '/'"),
    ("route-wildcard", f"applications: [{{{APPLICATION}, route_prefix: '/{{x}}'}}]",
     "applications.0.route_prefix: Invalid route_prefix '/{x}', may not contain wildcards"),
    ("route-empty", f"applications: [{{{APPLICATION}, route_prefix: ''}}]",
     "applications.0.route_prefix: Invalid route_prefix '', must start with a forward slash"),
    ("route-blank", f"applications: [{{{APPLICATION}, route_prefix: /a b}}]",
     "applications.0.route_prefix: '/a b' is not / or a path of letters, digits, and . _ ~ -"),
    ("route-query", f"applications: [{{{APPLICATION}, route_prefix: '/a?b'}}]",
     "applications.0.route_prefix: '/a?b' is not / or a path"),
    ("route-two-slashes", f"applications: [{{{APPLICATION}, route_prefix: //a}}]",
     "applications.0.route_prefix: '//a' is not / or a path"),
    ("route-dots", f"applications: [{{{APPLICATION}, route_prefix: /a/../b}}]",
     "applications.0.route_prefix: '/a/../b' is not / or a path"),
    ("backend", f"applications: [{{{APPLICATION}, args: {{transfer: {{backends: [NOPE]}}}}}}]",
     "transfer.backends: 'NOPE' is not one of "),
    ("backend-storage", f"applications: [{{{APPLICATION}, args: {{transfer: {{backends: "
     "[POSIX]}}}]", "transfer.backends: 'POSIX' is not one of "),
    ("label", f"applications: [{{{APPLICATION}, args: {{decode: {{labels: {{a: b c}}}}}}}}]",
     "decode.labels: Invalid label selector value `b c`"),
    ("router-label", f"applications: [{{{APPLICATION}, args: {{router: {{labels: {{a: b c}}}}}}}}]",
     "router.labels: Invalid label selector value `b c`"),
    ("resource", f"applications: [{{{APPLICATION}, args: {{decode: {{resources: "
     "{memory: 1}}}}]",
     "decode.resources: The resources dictionary must not contain the key 'memory'"),
    ("cpus", f"applications: [{{{APPLICATION}, args: {{router: {{cpus: 1.0e-9}}}}}}]",
     "router.cpus: The precision of the fractional quantity of resource num_cpus cannot go"),
    ("long-value", f"applications: [{{{APPLICATION}, args: {{slo: {{ttft_s: {'x' * 200_000}}}}}}}]",
     "slo.ttft_s: 'xxxx"),
    ("long-key", f"applications: [{{{APPLICATION}, args: {{{'x' * 1000}: 1}}}}]", "xxxx"),
    ("long-list", f"applications: [{{{APPLICATION}, args: {{model: {[1] * 9000}}}}}]",
     "model: [1, 1, "),
    ("control-key", f'applications: [{{{APPLICATION}, args: {{"mo\\ndel\\e[31m": 1}}}}]',
     "mo\\ndel\\x1b[31m: no such field"),
    ("control-key-outside", f'"a\\nb": 1\napplications: [{{{APPLICATION}}}]',
     "a\\nb: no such field"),
    ("control-value", f'applications: [{{{APPLICATION}, args: {{slo: {{ttft_s: "a\\nb"}}}}}}]',
     "slo.ttft_s: 'a\\nb' is not a number"),
    ("key-number", f"applications: [{{{APPLICATION}, args: {{1: 2}}}}]", "1: "),
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
    assert err[:-1].isprintable()
    assert len(err) <= 300


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


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("'::'", "http://[::1]:8000"),
        ("'::1'", "http://[::1]:8000"),
        ("node-1.cluster.local", "http://node-1.cluster.local:8000"),
    ],
)
def test_url_of_a_host(host: str, url: str, tmp_path: Path) -> None:
    path = tmp_path / "host.yaml"
    path.write_text(f"http_options: {{host: {host}}}\napplications: [{{{APPLICATION}}}]")
    assert load_serve_file(path).url == url


def test_url_has_the_route_prefix(tmp_path: Path) -> None:
    path = tmp_path / "prefix.yaml"
    path.write_text(
        "http_options: {host: 0.0.0.0, port: 81}\n"
        f"applications: [{{{APPLICATION}, route_prefix: /llm}}]"
    )
    assert load_serve_file(path).url == "http://127.0.0.1:81/llm"
