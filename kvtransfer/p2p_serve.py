"""Prefill's end of every pair: decodes connect, ask for blocks, and say when they have them.

Owns one listener, which has a thread for each decode that is connected. Only what the leases say
is held is sent; what a decode says is checked against them, never believed.
"""

import logging
import socket
import time

from kvtransfer.greeting import ServerGreeting
from kvtransfer.listener import Listener
from kvtransfer.p2p_errors import PairError, PairStuck
from kvtransfer.p2p_leases import Leases
from kvtransfer.p2p_link import Transport
from kvtransfer.p2p_pages import KVPages
from kvtransfer.p2p_stream import BlockStream
from kvtransfer.p2p_wire import (
    PURPOSE,
    VERSION,
    Connection,
    Fetch,
    Finished,
    Granted,
    Heartbeat,
    Hello,
    Message,
    Refused,
    Welcome,
)
from kvtransfer.tls import Tls

_log = logging.getLogger(__name__)


class PairServer:
    """Serves the decodes of one prefill worker. `port` is the one the kernel chose."""

    def __init__(
        self, host: str, *, engine_id: str, secret: str, tls: Tls | None = None, leases: Leases,
        pages: KVPages, transport: Transport, timeout_s: float,
    ) -> None:  # fmt: skip
        self._engine_id, self._leases, self._pages = engine_id, leases, pages
        self._transport, self._timeout_s = transport, timeout_s
        self._listener = Listener(
            host,
            lambda: ServerGreeting(engine_id, secret=secret, purpose=PURPOSE, version=VERSION),
            self._serve,
            name="kv-pairs",
            tls=tls,
        )
        self.port: int = self._listener.port

    def stop(self) -> None:
        """Ends every pair. Their threads end on their own."""
        self._listener.stop()

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._serve_pair(Connection(sock, self._timeout_s))
        except PairStuck as error:
            _log.error("A pair hangs and keeps the blocks that it was sending: %s", error)
        except PairError as error:
            _log.info("A pair ended: %s", error)

    def _serve_pair(self, connection: Connection) -> None:
        hello = connection.receive(self._timeout_s)
        if not isinstance(hello, Hello) or hello.prefill_engine_id != self._engine_id:
            connection.send(Refused(f"this is engine {self._engine_id}"))
            return
        address, open_link = self._transport.invite(connection.local_host)
        connection.send(Welcome(address))
        stream = BlockStream(open_link(), self._pages)
        try:
            while True:
                self._answer(connection.receive(None), connection, stream)
        finally:
            stream.close()

    def _answer(self, message: Message, connection: Connection, stream: BlockStream) -> None:
        match message:
            case Fetch():
                self._send_blocks(message, connection, stream)
            case Finished():
                self._leases.finish(message.request_id, message.lease_id)
            case Heartbeat():
                self._leases.extend(message.request_ids, now_s=time.perf_counter())
            case _:
                raise PairError(f"a decode does not say {type(message).__name__}")

    def _send_blocks(self, fetch: Fetch, connection: Connection, stream: BlockStream) -> None:
        if not self._pages.owns(fetch.block_ids):
            connection.send(Refused("there are no such blocks"))
            return
        if not self._leases.pin(fetch.request_id, fetch.lease_id):
            connection.send(Refused("its lease has ended"))
            return
        try:
            connection.send(Granted())
            stream.send(fetch.block_ids)
        except Exception:
            # A decode that still waits would take blocks that are queued for what they become once
            # they are given back. Where that cannot be stopped they stay as they are, for ever.
            stream.close()
            self._leases.unpin(fetch.request_id)
            raise
        self._leases.unpin(fetch.request_id)
