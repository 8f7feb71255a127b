"""TLS between members, as an option: both sides show a certificate that one authority has signed.

Owns the contexts made from the files, and reads them again for a new connection once they have
changed. Who a member is, is still for the greeting to say, inside.
"""

import logging
import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

_State = tuple[tuple[int, int, int], ...]
_Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files, the same on every node."""

    certificate: str
    """The node's, with those between it and the authority's."""
    key: str
    ca: str
    """The authority's certificate, or several."""


class Tls:
    """Contexts for new connections, of both kinds. From any thread."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises OSError or ssl.SSLError where the files cannot be used."""
        self._files = files
        self._lock = threading.Lock()
        self._state = self._observe()
        self._contexts = self._read()

    def server(self) -> ssl.SSLContext:
        """For who listens."""
        return self._current()[0]

    def client(self) -> ssl.SSLContext:
        """For who connects."""
        return self._current()[1]

    def _current(self) -> _Contexts:
        with self._lock:
            try:
                state = self._observe()
                if state != self._state:
                    self._contexts = self._read()
                    self._state = state
            except OSError as error:
                # In the midst of a rotation, perhaps: the next connection looks again.
                _log.warning("the new TLS files cannot be used, the old are: %s", error)
            return self._contexts

    def _observe(self) -> _State:
        files = (self._files.certificate, self._files.key, self._files.ca)
        states = [Path(file).stat() for file in files]
        return tuple((state.st_mtime_ns, state.st_ino, state.st_size) for state in states)

    def _read(self) -> _Contexts:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Nobody resumes; and what comes unasked on an idle connection can only be its end.
        server.num_tickets = 0
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Members are known by the authority and the secret, their addresses change.
        client.check_hostname = False
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_cert_chain(self._files.certificate, self._files.key)
            context.load_verify_locations(self._files.ca)
        return server, client


def shake_hands(sock: socket.socket, timeout_s: float) -> None:
    """The handshake of a connection that is encrypted; nothing on one that is not.

    Raises OSError: the other side has shown no certificate that we take, or not in time.
    """
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(timeout_s)
        sock.do_handshake()


def open_connection(
    address: tuple[str, int], tls: Tls | None, *, timeout_s: float
) -> socket.socket:
    """A connection to a member, encrypted with `tls`. Raises OSError."""
    sock = socket.create_connection(address, timeout_s)
    return sock if tls is None else tls.client().wrap_socket(sock)


def new_tls(files: TlsFiles | None) -> Tls | None:
    """None where there is to be none."""
    return None if files is None else Tls(files)
