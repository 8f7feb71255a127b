"""The first requests to a cluster, and what is made of the answers."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.first_answer import FirstAnswer, Problem
from cluster.serve_file import ServeFile, load_serve_file

CONFIG = """\
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - import_path: cluster.app:build
    route_prefix: /llm
    args: {{model: demo, served_name: "a \\"b\\"", router: {{frontend: {{api_key: [k, l]}}}}}}
"""


@dataclass
class Router:
    """Answers as it is told and keeps what it was asked."""

    file: ServeFile
    status: int = 200
    body: bytes = b"{}"
    asked: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            told.asked.append((self.path, self.headers["Authorization"], body))
            self.send_response(told.status)
            self.end_headers()
            self.wfile.write(told.body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        path = tmp_path / "serve.yaml"
        path.write_text(CONFIG.format(port=server.server_port))
        told = Router(load_serve_file(path))
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield told
        server.shutdown()
        serving.join()


def test_one_request_for_prefill_and_one_for_both(router: Router) -> None:
    assert FirstAnswer(router.file).problem is None
    assert [body["max_tokens"] for _, _, body in router.asked] == [1, 2]
    for path, key, body in router.asked:
        assert (path, key, body["model"]) == ("/llm/v1/completions", "Bearer k", 'a "b"')


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        pytest.param(
            503,
            b'{"error": {"message": "No decode\\nreplica"}}',
            Problem(text="status 503: No decode replica", is_refusal=False),
            id="not-yet",
        ),
        pytest.param(
            401, b"{}", Problem(text="status 401: {}", is_refusal=True), id="wants-another-key"
        ),
        pytest.param(
            500, b"<html>", Problem(text="status 500: <html>", is_refusal=False), id="no-json"
        ),
    ],
)
def test_an_answer_that_is_none(router: Router, status: int, body: bytes, problem: Problem) -> None:
    router.status, router.body = status, body
    assert FirstAnswer(router.file).problem == problem
    assert len(router.asked) == 1


def test_nobody_there(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(CONFIG.format(port=9))
    problem = FirstAnswer(load_serve_file(path)).problem
    assert problem is not None
    assert "refused" in problem.text
    assert not problem.is_refusal
