"""Methods, paths and headers as few clients send them. Owns the tables of them."""

import random
from collections.abc import Mapping, Sequence

from benchmarks.fuzz.bodies import COMPLETION, COMPLETIONS
from benchmarks.fuzz.http_bytes import Header, http_request
from benchmarks.fuzz.json_text import write_json
from benchmarks.fuzz.schema import Api
from benchmarks.fuzz.shots import Kind, Part, Shot

BODY = write_json(COMPLETION).encode()

_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE", "FOO")
_WITH_BODY = ("POST", "PUT", "PATCH")
_IDS = ("a", "%00", "..%2f..", "x" * 5_000, "%F0%9F%99%82", "resp_1")
_OTHER_PATHS = (
    *("/", "/docs", "/redoc", "/openapi.json", "/no-such-page", "/v1", "/v1/", "/v1/files"),
    *("/-/healthz", "/-/routes", "//v1//models", "/v1/models/", "/v1/models/demo", "/v1/%00"),
    *("/v1/../metrics", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models?" + "a=1&" * 2_000, "/inference"),
    *("/v1/embeddings", "/v1/audio/transcriptions", "/v1/load_lora_adapter", "/pause", "/sleep"),
    *("/" + "x" * 7_000, "/collective_rpc", "/reset_prefix_cache", "/server_info"),
)
_ODD_PATHS: tuple[str | bytes, ...] = (
    *("*", "http://127.0.0.1/v1/models", "http://[::1", "v1/models", "/" + "x" * 100_000, ""),
    *(b"/caf\xe9", b"/\x00", b"/\xff\xfe", "/v1/models#a", "/v1/models?a=é", "/a b c"),
)

_LONG = "x" * 8_000
GOOD_HEADERS: Mapping[str, Sequence[Header]] = {
    "60 kB in one": [("X-Long", "x" * 60_000)],
    "200 of them": [(f"X-Many-{number}", "1") for number in range(200)],
    "60 kB in many": [(f"X-Many-{number}", "x" * 500) for number in range(120)],
    "a long cookie": [("Cookie", _LONG)],
    "a long authorization": [("Authorization", f"Bearer {_LONG}")],
    "a wrong authorization": [("Authorization", "Basic %%%")],
    "a request id": [("X-Request-Id", "mine-7")],
    "a long request id": [("X-Request-Id", _LONG)],
    "an empty request id": [("X-Request-Id", "")],
    "request ids": [("X-Request-Id", "a"), ("X-Request-Id", "b")],
    "a request id, not ASCII": [("X-Request-Id", b"caf\xe9")],
    "a session id, not ASCII": [("X-Session-ID", b"caf\xe9\xff")],
    "a timeout, not ASCII": [("X-Request-Timeout-Seconds", b"caf\xe9")],
    **{
        f"a timeout of {value}": [("X-Request-Timeout-Seconds", value)]
        for value in ("0", "-1", "0.001", "0.05", "nan", "inf", "1e400", "abc", "9" * 400)
    },
    "disconnects disabled": [("X-Request-Disconnect-Disabled", "?1")],
    "a multiplexed model": [("serve_multiplexed_model_id", "nowhere")],
    "Serve's router's": [("X-Serve-Router-Replica", "x"), ("x-serve-router-", "")],
    **{
        f"a priority of {value}": [("X-Vllm-Priority", value)]
        for value in ("1", "-9", str(2**63), "9" * 30, "nan", "x")
    },
    "a data parallel rank": [("X-data-parallel-rank", "7")],
    "a trace": [("traceparent", "00-zz-zz-zz"), ("tracestate", _LONG)],
    "another host": [("X-Forwarded-For", "1, 2"), ("Forwarded", "for=x"), ("X-Real-IP", "é")],
    "an origin": [("Origin", "http://elsewhere"), ("Access-Control-Request-Method", "POST")],
    "ranges": [("Range", "bytes=0-9999999999999999999999")],
    "nothing accepted": [("Accept", "nothing/at-all;q=2"), ("Accept-Encoding", "x;q=abc")],
    "LoRA and salt": [("X-Lora", "a"), ("X-Cache-Salt", "b"), ("X-Tenant", "c")],
}
"""All of them well-formed: HTTP allows any byte in a value, but for controls."""
BAD_HEADERS: Mapping[str, Sequence[Header]] = {
    "300 kB in one": [("X-Long", "x" * 300_000)],
    "5,000 of them": [(f"X-Many-{number}", "1") for number in range(5_000)],
    "two lengths, equal": [("Content-Length", str(len(BODY)))],
    "two lengths": [("Content-Length", "1")],
    "a length below zero": [("Content-Length", "-1")],
    "a length of letters": [("Content-Length", "abc")],
    "a huge length": [("Content-Length", "9" * 30)],
    "length and chunks": [("Transfer-Encoding", "chunked")],
    "an encoding that is none": [("Transfer-Encoding", "gzip, nonsense")],
    "two hosts": [("Host", "elsewhere")],
    "a host that is none": [("Host", "\x00[]:99999999")],
    "a name that is none": [("X Y\x00", "1")],
    "no name": [("", "1")],
    "a zero byte": [("X-Zero", b"a\x00b")],
    "a line end in it": [("X-Line", b"a\rb\nc")],
    "folded": [("X-Folded", "a\r\n b")],
    "no colon": [("X-Nothing\r\nnothing", "1")],
    "an upgrade": [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Key", "x")],
    "HTTP/2 wanted": [("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAAQAAP__")],
    "patience": [("Expect", "100-continue")],
    "other expectations": [("Expect", "a miracle")],
    "another type": [("Content-Type", "text/plain")],
    "a form": [("Content-Type", "multipart/form-data; boundary=")],
}


def path_shot(rng: random.Random, api: Api) -> Shot:
    """Any method of any path, in any spelling."""
    if rng.random() < 0.2:
        odd = rng.choice(_ODD_PATHS)
        target = odd if isinstance(odd, bytes) else odd.encode()
        data = b"GET " + target + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        return Shot(kind=Kind.PATH, name=f"GET {odd[:40]!r}", parts=(Part(data=data),))
    path = _path(rng, api)
    method = rng.choice(_METHODS)
    body = rng.choice((BODY, b"", b"{}")) if method in _WITH_BODY else None
    return Shot(
        kind=Kind.PATH,
        name=f"{method} {path[:60]}",
        parts=(Part(data=http_request(method, path, body)),),
        is_request=True,
        has_no_body=method == "HEAD",
    )


def header_shot(rng: random.Random) -> Shot:
    """A small good request with other headers."""
    good = rng.random() < 0.6
    table = GOOD_HEADERS if good else BAD_HEADERS
    name = rng.choice(sorted(table))
    data = http_request("POST", COMPLETIONS, BODY, headers=table[name])
    return Shot(kind=Kind.HEADERS, name=name, parts=(Part(data=data),), is_request=good)


def _path(rng: random.Random, api: Api) -> str:
    if rng.random() < 0.4:
        return rng.choice(_OTHER_PATHS)
    path = rng.choice(api.routes).path
    start, brace, rest = path.partition("{")
    return start + rng.choice(_IDS) + rest.partition("}")[2] if brace else path
