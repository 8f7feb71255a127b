"""A listening socket for members only, served by threads: one for each connection.

Owns the socket, its threads and its connections. What members say is the business of `serve`.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from kvtransfer.errors import GreetingFailed
from kvtransfer.greeting import Greeting, Lobby, greet
from kvtransfer.tls import Tls, shake_hands

GREETING_TIMEOUT_S = 5.0
_PAUSE_S = 0.1
"""Before the next try where the process has no file or no thread left for a connection."""

_log = logging.getLogger(__name__)


class Listener:
    """Accepts connections, greets, and has each member's served in its own thread.

    `port` is the bound one: a given one, or the kernel's choice.
    """

    def __init__(
        self, host: str, new_greeting: Callable[[], Greeting],
        serve: Callable[[socket.socket], None], *, name: str, tls: Tls | None, port: int = 0,
    ) -> None:  # fmt: skip
        self._new_greeting, self._serve, self._name = new_greeting, serve, name
        self._tls = tls
        self._lobby = Lobby()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_stopped = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        self.port: int = self._socket.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True, name=name)
        self.thread.start()

    def stop(self) -> None:
        """Accepts nobody any more and ends every connection; their threads end on their own."""
        self._is_stopped = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self._socket.close()
        self.end_connections()

    def end_connections(self) -> None:
        """As if every other side had ended its own."""
        with self._lock:
            for sock in self._connections:
                _end(sock)

    def _accept(self) -> None:
        while not self._is_stopped:
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                if not self._is_stopped:
                    _log.warning("%s: nobody can be accepted: %s", self._name, error)
                    time.sleep(_PAUSE_S)
                continue
            thread = threading.Thread(
                target=self._run, args=(sock, address[0]), daemon=True, name=self._name
            )
            try:
                thread.start()
            except RuntimeError as error:
                _log.warning("%s: nobody can be served: %s", self._name, error)
                sock.close()
                time.sleep(_PAUSE_S)

    def _run(self, accepted: socket.socket, host: str) -> None:
        try:
            with self._with_tls(accepted) as sock:
                self._let_in(sock)
        except (GreetingFailed, OSError) as error:
            self._lobby.complain(_log.info, host, f"{self._name}: a connection ended: {error}")
        except Exception:
            # Whatever one connection brings, the others go on.
            _log.exception("%s: a connection ended", self._name)

    def _with_tls(self, sock: socket.socket) -> socket.socket:
        if self._tls is None:
            return sock
        context = self._tls.server()
        return context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def _let_in(self, sock: socket.socket) -> None:
        with self._lock:
            self._connections.add(sock)
        try:
            if self._is_stopped:
                return
            self._lobby.enter(sock, lambda: _end(sock))
            shake_hands(sock, GREETING_TIMEOUT_S)
            greet(sock, self._new_greeting(), timeout_s=GREETING_TIMEOUT_S)
            self._lobby.leave(sock)
            self._serve(sock)
        finally:
            self._lobby.leave(sock)
            with self._lock:
                self._connections.discard(sock)


def _end(sock: socket.socket) -> None:
    """Wakes whoever reads from it or writes to it."""
    with contextlib.suppress(OSError):  # The other side may have ended it.
        sock.shutdown(socket.SHUT_RDWR)
