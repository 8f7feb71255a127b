"""One client of the chaos run: it asks, and says what came and when.

Owns a request from its connection to its outcome. It takes any fault of the server for an outcome
and raises none; whether the outcome is right is judged elsewhere.
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.chaos_answers import Answer, AnswerBuilder
from benchmarks.chaos_cases import Case
from cluster.haproxy import ERRORS

_SMALL_BUFFER_BYTES = 128 * 1024
"""Of a client that does not read: the kernel must not do the reading in its place. Less than one of
the loopback's segments, 64 KiB, would make it slow for as long as it reads, too."""


_BROKEN_BEHIND_PROXY = (502, 503, 504)
"""What HAProxy answers where its connection to a router ends before the answer begins, or is
refused. A router's own errors have other messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a request. Times are `time.monotonic`'s, in seconds.

    `arrivals_s` has for each choice the arrivals of the chunks that brought tokens. `error` says
    why there is no whole answer; a client that left by itself has `left` and neither. One that did
    not read for a while is not `read_at_once`: its arrivals say nothing about the server. `broken`
    is an error that consists in the connection's end, or in the proxy saying so.
    """

    case: str
    start_s: float
    end_s: float
    answer: Answer | None
    arrivals_s: tuple[tuple[float, ...], ...]
    error: str | None
    left: bool = False
    read_at_once: bool = True
    broken: bool = False


class _Refused(Exception):
    """The server answered with an error, or with something that is no answer."""


class _Broken(Exception):
    """The connection to the server, or the proxy's connection to it, has ended too early."""


class _Left(Exception):
    """The client went away, as it was told to."""


class Client:
    """Sends requests, each over a connection of its own, with `timeout_s` for all of it."""

    def __init__(self, base_url: str, *, timeout_s: float) -> None:
        self._base_url = base_url
        self._timeout_s = timeout_s

    async def ask(
        self,
        case: Case,
        *,
        cache_salt: str | None = None,
        leave_after: int | None = None,
        pause_s: float = 0.0,
    ) -> Outcome:
        """Sends a case and waits for its end.

        Of a stream, the client drops the connection after `leave_after` chunks, or reads nothing
        for `pause_s` after the first.
        """
        request = _Request(case, leave_after=leave_after, pause_s=pause_s)
        error: str | None = None
        left = broken = False
        try:
            async with asyncio.timeout(self._timeout_s + pause_s):
                async with _connected(patient=not pause_s) as client:
                    url = f"{self._base_url}/{case.path}"
                    await request.send(client, url, case.body(cache_salt))
        except TimeoutError:
            error = f"no end within {self._timeout_s:g} s"
        except _Left:
            left = True
        except _Refused as refusal:
            error = str(refusal)
        except _Broken as end:
            error, broken = str(end), True
        except httpx.TransportError as end:
            error, broken = f"{type(end).__name__}: {end}", True
        return Outcome(
            case=case.name,
            start_s=request.start_s,
            end_s=time.monotonic(),
            answer=None if error or left else request.builder.answer(),
            arrivals_s=tuple(tuple(arrivals_s) for arrivals_s in request.arrivals_s),
            error=error,
            left=left,
            read_at_once=not pause_s,
            broken=broken,
        )


class _Request:
    """Owns what one request has brought so far; `send` may be interrupted at any time."""

    def __init__(self, case: Case, *, leave_after: int | None, pause_s: float) -> None:
        self._case = case
        self._leave_after = leave_after
        self._pause_s = pause_s
        self.builder = AnswerBuilder()
        self.start_s = time.monotonic()
        self.arrivals_s: list[list[float]] = [[] for _ in range(case.num_choices)]

    async def send(self, client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> None:
        if self._case.streamed:
            await self._stream(client, url, body)
            return
        response = await client.post(url, json=body)
        _check_status(response.status_code, response.text)
        self.builder.add(_parse(response.text))

    async def _stream(self, client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> None:
        num_chunks = 0
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                _check_status(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return
                self._take(_parse(line.removeprefix("data: ")))
                num_chunks += 1
                if num_chunks == self._leave_after:
                    raise _Left
                if num_chunks == 1 and self._pause_s:
                    await asyncio.sleep(self._pause_s)
        raise _Broken("the stream was cut off")

    def _take(self, chunk: Mapping[str, Any]) -> None:
        now_s = time.monotonic()
        for index in self.builder.add(chunk):
            self.arrivals_s[index].append(now_s)


@asynccontextmanager
async def _connected(*, patient: bool) -> AsyncIterator[httpx.AsyncClient]:
    """A client without limits but the caller's; one that is not `patient` keeps little unread."""
    option = (socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)
    # A connection each: one that is kept alive may be closed by the server just when it is used
    # again, which is nobody's fault.
    transport = httpx.AsyncHTTPTransport(
        verify=False,  # reading the certificates takes longer than a request
        limits=httpx.Limits(max_keepalive_connections=0),
        socket_options=() if patient else (option,),
    )
    async with httpx.AsyncClient(transport=transport, timeout=None) as client:
        yield client


def _check_status(status: int, body: str) -> None:
    if status in _BROKEN_BEHIND_PROXY and _message(body) == ERRORS[status]:
        raise _Broken(f"HTTP {status} from the proxy")
    if status != 200:
        raise _Refused(f"HTTP {status}: {_message(body)}")


def _parse(text: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        raise _Refused(f"not JSON: {text[:100]!r}") from None
    if not isinstance(parsed, dict) or "choices" not in parsed:
        raise _Refused(f"error in the stream: {_message(text)}")
    return parsed


def _message(body: str) -> str:
    """The message of an error of OpenAI's form, or the beginning of what came instead."""
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return body[:300]
