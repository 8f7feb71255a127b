"""The first requests of a cluster that has just started, made before anybody is told that it is up.

Owns these requests. One is answered by prefill alone; one has a second token, which is decode's.
"""

import contextlib
import json
import queue
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from typing import Any

from cluster.local_http import OPENER
from cluster.serve_file import ServeFile

_ONE_TOKEN, _TWO_TOKENS = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request was not answered, in one line."""

    text: str
    is_refusal: bool
    """The cluster does not want such a request, now and later: by its configuration (a key that is
    not known here, a limit), and not because it cannot."""


class FirstAnswer:
    """Asks in a thread, so that whoever waits can look after other things."""

    def __init__(self, file: ServeFile) -> None:
        self._file = file
        self._outcome: queue.Queue[Problem | None] = queue.Queue()
        # Nobody waits for it to end: it may be in the midst of a request.
        threading.Thread(target=self._ask, daemon=True).start()

    @property
    def is_done(self) -> bool:
        return not self._outcome.empty()

    @property
    def problem(self) -> Problem | None:
        """Once it is done: why there is no answer; None if there is one."""
        return self._outcome.get()

    def _ask(self) -> None:
        for max_tokens in (_ONE_TOKEN, _TWO_TOKENS):
            if (problem := _post(self._file, max_tokens)) is not None:
                self._outcome.put(problem)
                return
        self._outcome.put(None)


def _post(file: ServeFile, max_tokens: int) -> Problem | None:
    headers = {"Content-Type": "application/json"}
    if (key := file.config.router.api_key) is not None:
        headers["Authorization"] = f"Bearer {key}"
    body: dict[str, Any] = {
        "model": file.config.public_name,
        "prompt": "Hello",
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{file.url}/v1/completions", data=json.dumps(body).encode(), headers=headers
    )
    try:
        # No time limit: on a slow machine the first answer takes as long as it takes.
        with OPENER.open(request) as response:
            response.read()
            return None
    except urllib.error.HTTPError as error:
        text = f"status {error.code}: {_message(error)}"
        return Problem(text=text, is_refusal=error.code < HTTPStatus.INTERNAL_SERVER_ERROR)
    except (OSError, HTTPException) as error:
        return Problem(text=str(error) or repr(error), is_refusal=False)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read().decode(errors="replace")
    except (OSError, HTTPException):  # it broke off
        return "no message"
    with contextlib.suppress(ValueError, KeyError, TypeError):  # not of OpenAI's form
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]
