"""The connection between a router and a replica: frames over TCP, authenticated, bounded.

Owns the two ends of one connection each. What the messages mean is the business of those who hold
the ends. A connection ends in exactly one call of `on_closed`, whoever ended it.
"""

import asyncio
import hmac
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from engine.errors import ChannelClosed, ProtocolError
from engine.exit_cause import EngineExit
from engine.wire import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    AddRequest,
    Challenge,
    FrameReader,
    Hello,
    Holdings,
    Kind,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Taken,
    Warmed,
    pack_frame,
    prove,
)
from kvtransfer.peers import KVPeer

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 64 * 1024 * 1024
"""A side that lets this much pile up unread is taken for dead: memory stays bounded."""

GREETING_TIMEOUT_S = 5.0


class _Connection(asyncio.Protocol):
    """Frames in, frames out, over one transport. Subclasses say what a frame does."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._encoder = MsgpackEncoder()
        self.peer = "?"
        self.closed_because = "the other side closed the connection"

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, kind: Kind, message: object) -> None:
        """Queues one message. A connection that has ended swallows it: its owner is told anyway."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(pack_frame(kind, self._encoder.encode(message)))
        if self._transport.get_write_buffer_size() > MAX_PENDING_BYTES:
            self.close(f"more than {MAX_PENDING_BYTES} bytes wait to be read by {self.peer}")

    def close(self, reason: str) -> None:
        """Ends the connection at once; what the kernel has not taken yet is dropped."""
        self.closed_because = reason
        if self._transport is not None:
            self._transport.abort()

    def close_after(self, kind: Kind, message: object, *, reason: str) -> None:
        """Ends the connection once the other side has been sent a last message."""
        self.closed_because = reason
        self.send(kind, message)
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Another event loop's transport (uvloop) has the methods but not the class.
        self._transport = cast(asyncio.Transport, transport)
        self.peer = str(transport.get_extra_info("peername"))

    def data_received(self, data: bytes) -> None:
        try:
            for kind, buffers in self._reader.feed(data):
                self.frame_received(kind, buffers)
                if not self.is_open:
                    return
        except Exception as error:
            # The other side's bytes decide what happens above, so any error there is its error.
            logger.warning("closing the channel with %s: %s", self.peer, error)
            self.close(f"{type(error).__name__}: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.closed_because = str(exc)
        self.ended()

    def frame_received(self, kind: Kind, buffers: Sequence[bytes]) -> None:
        raise NotImplementedError

    def ended(self) -> None:
        raise NotImplementedError


class RouterRequests(Protocol):
    """Who a replica's end of the channel speaks to: the owner of the engine."""

    def facts(self) -> ReplicaFacts: ...
    def router_joined(self, router: "RouterEnd") -> None: ...
    def add(self, router: "RouterEnd", add: AddRequest) -> None: ...
    def abort(self, router: "RouterEnd", request_ids: list[str]) -> None: ...
    def release(self, router: "RouterEnd", request_ids: list[str]) -> None: ...
    def clear(self, router: "RouterEnd", request_ids: list[str]) -> None: ...
    def holdings(self, router: "RouterEnd") -> Holdings: ...
    def warm_up(self, router: "RouterEnd", peer: KVPeer) -> None: ...
    def forget(self, engine_ids: list[str]) -> None: ...
    def router_gone(self, router: "RouterEnd") -> None: ...


class RouterEnd(_Connection):
    """The replica's end of one connection: one router, once it has proved that it is one."""

    def __init__(self, secret: str, owner: RouterRequests) -> None:
        super().__init__()
        self._secret = secret
        self._owner = owner
        self._nonce = os.urandom(16)
        self._greeting_deadline: asyncio.TimerHandle | None = None
        self._decode_add = MsgpackDecoder(AddRequest)
        self._decode_ids = MsgpackDecoder(list[str])
        self.router_id: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._greeting_deadline = asyncio.get_running_loop().call_later(
            GREETING_TIMEOUT_S, self.close, "no greeting in time"
        )
        self.send(Kind.CHALLENGE, Challenge(PROTOCOL_VERSION, self._nonce))

    def frame_received(self, kind: Kind, buffers: Sequence[bytes]) -> None:
        if self.router_id is None:
            self._greet(kind, buffers)
        elif kind == Kind.ADD:
            add: AddRequest = self._decode_add.decode(buffers)
            self._owner.add(self, add)
        elif kind == Kind.ABORT:
            self._owner.abort(self, self._decode_ids.decode(buffers))
        elif kind == Kind.RELEASE:
            self._owner.release(self, self._decode_ids.decode(buffers))
        elif kind == Kind.ASK_HOLDINGS:
            self.send(Kind.HOLDINGS, self._owner.holdings(self))
        elif kind == Kind.CLEAR:
            self._owner.clear(self, self._decode_ids.decode(buffers))
        elif kind == Kind.WARM_UP:
            self._owner.warm_up(self, MsgpackDecoder(KVPeer).decode(buffers))
        elif kind == Kind.FORGET:
            self._owner.forget(self._decode_ids.decode(buffers))
        else:
            raise ProtocolError(f"a router does not send {kind.name}")

    def _greet(self, kind: Kind, buffers: Sequence[bytes]) -> None:
        if kind != Kind.HELLO:
            raise ProtocolError(f"{kind.name} before a greeting")
        hello: Hello = MsgpackDecoder(Hello).decode(buffers)
        if not hmac.compare_digest(hello.proof, prove(self._secret, self._nonce)):
            raise ProtocolError("the other side does not know this application's secret")
        if self._greeting_deadline is not None:
            self._greeting_deadline.cancel()
        self.router_id = hello.router_id
        self._reader.max_bytes = MAX_FRAME_BYTES
        self.send(Kind.WELCOME, self._owner.facts())
        self._owner.router_joined(self)

    def ended(self) -> None:
        if self._greeting_deadline is not None:
            self._greeting_deadline.cancel()
        if self.router_id is not None:
            self._owner.router_gone(self)


class ReplicaOutputs(Protocol):
    """Who a router's end of the channel speaks to."""

    def step_received(self, step: StepOutputs) -> None: ...
    def taken(self, taken: Taken) -> None: ...
    def rejected(self, rejection: Rejection) -> None: ...
    def warmed(self, warmed: Warmed) -> None: ...
    def holds(self, holdings: Holdings) -> None: ...
    def engine_ended(self, how: EngineExit) -> None: ...
    def replica_gone(self, reason: str) -> None: ...


class ReplicaEnd(_Connection):
    """The router's end of one connection: one replica. Made by `connect`."""

    def __init__(self, secret: str, router_id: str, owner: ReplicaOutputs) -> None:
        super().__init__()
        self._secret = secret
        self._router_id = router_id
        self._owner = owner
        self._decode_step = MsgpackDecoder(StepOutputs)
        self.welcome: asyncio.Future[ReplicaFacts] = asyncio.get_running_loop().create_future()

    def frame_received(self, kind: Kind, buffers: Sequence[bytes]) -> None:
        if kind == Kind.STEP:
            self._owner.step_received(self._decode_step.decode(buffers))
        elif kind == Kind.TAKEN:
            self._owner.taken(MsgpackDecoder(Taken).decode(buffers))
        elif kind == Kind.REJECT:
            self._owner.rejected(MsgpackDecoder(Rejection).decode(buffers))
        elif kind == Kind.WARMED:
            self._owner.warmed(MsgpackDecoder(Warmed).decode(buffers))
        elif kind == Kind.HOLDINGS:
            self._owner.holds(MsgpackDecoder(Holdings).decode(buffers))
        elif kind == Kind.ENDED:
            self._owner.engine_ended(MsgpackDecoder(EngineExit).decode(buffers))
        elif kind == Kind.CHALLENGE:
            challenge: Challenge = MsgpackDecoder(Challenge).decode(buffers)
            if challenge.version != PROTOCOL_VERSION:
                raise ProtocolError(f"protocol {challenge.version}, not {PROTOCOL_VERSION}")
            proof = prove(self._secret, challenge.nonce)
            self.send(Kind.HELLO, Hello(self._router_id, proof))
            self._reader.max_bytes = MAX_FRAME_BYTES
        elif kind == Kind.WELCOME and not self.welcome.done():
            self.welcome.set_result(MsgpackDecoder(ReplicaFacts).decode(buffers))
        else:
            raise ProtocolError(f"a replica does not send {kind.name} here")

    def ended(self) -> None:
        if self.welcome.done() and not self.welcome.cancelled():
            self._owner.replica_gone(self.closed_because)
        elif not self.welcome.done():
            self.welcome.set_exception(ChannelClosed(self.closed_because))


async def listen(
    host: str, secret: str, owner: RouterRequests
) -> tuple[asyncio.AbstractServer, int]:
    """Lets routers in on a free port of `host`; returns the server and the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: RouterEnd(secret, owner), host, 0)
    port: int = server.sockets[0].getsockname()[1]
    return server, port


async def connect(
    address: tuple[str, int], *, secret: str, router_id: str, owner: ReplicaOutputs
) -> tuple[ReplicaEnd, ReplicaFacts]:
    """Connects to a replica and is let in.

    Raises:
        OSError: nobody listens there.
        ChannelClosed: the replica did not let us in.
        TimeoutError: it did not answer.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(GREETING_TIMEOUT_S):
        make: Callable[[], Any] = lambda: ReplicaEnd(secret, router_id, owner)  # noqa: E731
        _, end = await loop.create_connection(make, *address)
        try:
            return end, await end.welcome
        except BaseException:
            end.close("the greeting failed")
            raise
