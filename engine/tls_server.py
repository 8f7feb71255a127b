"""Accepts encrypted connections in an event loop, each with the certificates of that moment.

asyncio's own servers keep the context that they were given. Owns the listening socket and the
connections whose handshake is not over.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial

from kvtransfer.greeting import Lobby
from kvtransfer.tls import Tls

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
"""Before the next try where the process has no file left for a connection."""


class TlsServer(asyncio.AbstractServer):
    """As `loop.create_server` makes one, for members with a certificate."""

    def __init__(
        self,
        listener: socket.socket,
        new_protocol: Callable[[], asyncio.Protocol],
        tls: Tls,
        *,
        handshake_timeout_s: float,
    ) -> None:
        self._listener, self._new_protocol, self._tls = listener, new_protocol, tls
        self._timeout_s = handshake_timeout_s
        self._lobby = Lobby()
        self._handshakes: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(), name="tls-accept")

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._accepting.get_loop()

    def is_serving(self) -> bool:
        return not self._accepting.done()

    async def start_serving(self) -> None:
        """It serves from the beginning."""

    async def serve_forever(self) -> None:
        await self._accepting

    def close(self) -> None:
        for task in (self._accepting, *self._handshakes):
            task.cancel()
        self._listener.close()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._handshakes, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._listener)
            except OSError as error:
                logger.warning("nobody can be accepted: %s", error)
                await asyncio.sleep(_PAUSE_S)
                continue
            task = asyncio.create_task(self._shake_hands(sock, address[0]))
            self._handshakes.add(task)
            self._lobby.enter(task, partial(_cancel, task))
            task.add_done_callback(self._is_over)

    async def _shake_hands(self, sock: socket.socket, host: str) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._new_protocol,
                sock,
                ssl=self._tls.server(),
                ssl_handshake_timeout=self._timeout_s,
            )
        except OSError as error:
            # The event loop has closed the socket.
            told = f"a connection without a certificate that is taken: {error}"
            self._lobby.complain(logger.warning, host, told)

    def _is_over(self, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        self._lobby.leave(task)


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
