"""The connection between a router and a replica: frames over TCP, between members only.

Owns the two ends of one connection each. What the messages mean is the business of those who hold
the ends. A connection ends in exactly one call of `ended`, and only because one side has ended it,
speaks another language, or gives no sign of life: never because much is pending.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from engine.errors import ChannelClosed, ProtocolError
from engine.exit_cause import EngineExit
from engine.outbox import Outbox
from engine.tls_server import TlsServer
from engine.wire import (
    PROTOCOL_VERSION,
    AddRequest,
    FrameReader,
    Holdings,
    Kind,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Taken,
    Transferred,
    Warmed,
    pack_frame,
)
from kvtransfer.errors import GreetingFailed
from kvtransfer.greeting import ClientGreeting, Greeting, Lobby, ServerGreeting
from kvtransfer.peers import KVPeer
from kvtransfer.tls import Tls

logger = logging.getLogger(__name__)

PURPOSE = "router channel"
GREETING_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 10.0
"""How long the other side may take nothing of what is sent, unless told otherwise."""


class _Connection(asyncio.Protocol):
    """Frames in, frames out, over one transport. Subclasses say what a frame does."""

    def __init__(self, greeting: Greeting, stall_timeout_s: float) -> None:
        self._greeting = greeting
        self._stall_timeout_s = stall_timeout_s
        self._transport: asyncio.Transport | None = None
        self._outbox: Outbox | None = None
        self._reader = FrameReader()
        self._encoder = MsgpackEncoder()
        self.peer = "?"
        self.closed_because = "the other side closed the connection"
        self.heard_s = time.monotonic()
        """When bytes came last, if only a part of a message."""

    @property
    def is_open(self) -> bool:
        if self._transport is None or self._outbox is None:
            return False
        return not self._transport.is_closing() and not self._outbox.is_closing

    @property
    def num_pending(self) -> int:
        """Bytes that were sent and that the other side has not taken yet."""
        return self._outbox.num_pending if self._outbox is not None else 0

    @property
    def is_drained(self) -> bool:
        """Whether `drained` returns at once."""
        return self._outbox is None or self._outbox.is_drained

    async def drained(self) -> None:
        """Returns once the other side has taken most of what was sent, or the connection ends."""
        if self._outbox is not None:
            await self._outbox.drained()

    def send(self, kind: Kind, message: object) -> None:
        """Queues one message as a whole, however much is pending.

        A connection that has ended swallows it: its owner is told anyway. Raises what the encoder
        does where the message cannot be encoded; then nothing of it is sent.
        """
        if self._outbox is not None and self.is_open:
            self._outbox.put(pack_frame(kind, self._encoder.encode(message)))

    def close(self, reason: str) -> None:
        """Ends the connection at once; what the kernel has not taken yet is dropped."""
        self.closed_because = reason
        if self._transport is not None:
            self._transport.abort()

    def close_after(self, kind: Kind, message: object, *, reason: str) -> None:
        """Ends the connection once the other side has been sent a last message."""
        self.closed_because = reason
        self.send(kind, message)
        if self._outbox is not None:
            self._outbox.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Another event loop's transport (uvloop) has the methods but not the class.
        self._transport = cast(asyncio.Transport, transport)
        self._outbox = Outbox(
            self._transport, stall_timeout_s=self._stall_timeout_s, stalled=self._stalled
        )
        self.peer = str(transport.get_extra_info("peername"))
        self._transport.write(self._greeting.begin())

    def data_received(self, data: bytes) -> None:
        self.heard_s = time.monotonic()
        try:
            if not self._greeting.is_done:
                data = self._greet(data)
            for kind, buffers in self._reader.feed(data):
                self.frame_received(kind, buffers)
                if not self.is_open:
                    return
        except Exception as error:
            # The other side's bytes decide what happens above, so any error there is its error.
            self.complain(f"closing the channel: {error}")
            self.close(f"{type(error).__name__}: {error}")

    def _greet(self, data: bytes) -> bytes:
        """Goes on with the greeting; returns what came after it."""
        assert self._transport is not None
        try:
            self._transport.write(self._greeting.feed(data))
        except GreetingFailed as failure:
            self.complain(f"the greeting failed: {failure}")
            self.closed_because = str(failure)
            self._transport.write(failure.farewell)
            self._transport.close()
            return b""
        if not self._greeting.is_done:
            return b""
        self.greeted()
        return self._greeting.take_rest()

    def pause_writing(self) -> None:
        assert self._outbox is not None
        self._outbox.pause()

    def resume_writing(self) -> None:
        assert self._outbox is not None
        self._outbox.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.closed_because = str(exc)
        if self._outbox is not None:
            self._outbox.end()
        self.ended()

    def _stalled(self) -> None:
        self.close(f"{self.peer} has taken nothing for {self._stall_timeout_s:g} s")

    def complain(self, text: str) -> None:
        """Logs what was wrong with the other side."""
        logger.warning("%s: %s", self.peer, text)

    def greeted(self) -> None:
        """The other side is a member, and the one that it should be."""

    def frame_received(self, kind: Kind, buffers: Sequence[memoryview]) -> None:
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

    def __init__(
        self, secret: str, owner: RouterRequests, lobby: Lobby, stall_timeout_s: float
    ) -> None:
        super().__init__(
            ServerGreeting(
                owner.facts().engine_id, secret=secret, purpose=PURPOSE, version=PROTOCOL_VERSION
            ),
            stall_timeout_s,
        )
        self._owner = owner
        self._lobby = lobby
        self._greeting_deadline: asyncio.TimerHandle | None = None
        self._decode_add = MsgpackDecoder(AddRequest)
        self._decode_ids = MsgpackDecoder(list[str])
        self.router_id: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._greeting_deadline = asyncio.get_running_loop().call_later(
            GREETING_TIMEOUT_S, self.close, "no greeting in time"
        )
        self._lobby.enter(self, lambda: self.close("it makes room for others that connect"))

    def complain(self, text: str) -> None:
        assert self._transport is not None
        host, *_ = self._transport.get_extra_info("peername") or ("somebody",)
        self._lobby.complain(logger.warning, host, text)

    def greeted(self) -> None:
        self._leave_lobby()
        self.router_id = self._greeting.peer_name
        self.send(Kind.WELCOME, self._owner.facts())
        self._owner.router_joined(self)

    def frame_received(self, kind: Kind, buffers: Sequence[memoryview]) -> None:
        if kind == Kind.ADD:
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

    def ended(self) -> None:
        self._leave_lobby()
        if self.router_id is not None:
            self._owner.router_gone(self)

    def _leave_lobby(self) -> None:
        self._lobby.leave(self)
        if self._greeting_deadline is not None:
            self._greeting_deadline.cancel()


class ReplicaOutputs(Protocol):
    """Who a router's end of the channel speaks to."""

    def step_received(self, step: StepOutputs) -> None: ...
    def taken(self, taken: Taken) -> None: ...
    def rejected(self, rejection: Rejection) -> None: ...
    def warmed(self, warmed: Warmed) -> None: ...
    def holds(self, holdings: Holdings) -> None: ...
    def transferred(self, moved: list[Transferred]) -> None: ...
    def engine_ended(self, how: EngineExit) -> None: ...
    def replica_gone(self, reason: str) -> None: ...


_Owner = TypeVar("_Owner", bound=ReplicaOutputs)


class ReplicaEnd(_Connection):
    """The router's end of one connection: one replica. Made by `connect`."""

    def __init__(
        self,
        greeting: ClientGreeting,
        welcomed: Callable[["ReplicaEnd", ReplicaFacts], ReplicaOutputs],
        stall_timeout_s: float,
    ) -> None:
        super().__init__(greeting, stall_timeout_s)
        self._welcomed = welcomed
        self._owner: ReplicaOutputs | None = None
        """None before the replica's welcome: until then it says nothing else."""
        self._decode_step = MsgpackDecoder(StepOutputs)
        self.welcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        """The owner, once there is one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        _notice_silence(transport.get_extra_info("socket"), self._stall_timeout_s)
        super().connection_made(transport)

    def frame_received(self, kind: Kind, buffers: Sequence[memoryview]) -> None:
        owner = self._owner
        if owner is None:
            if kind != Kind.WELCOME or self.welcome.done():
                raise ProtocolError(f"a replica does not send {kind.name} here")
            self._owner = self._welcomed(self, MsgpackDecoder(ReplicaFacts).decode(buffers))
            self.welcome.set_result(self._owner)
        elif kind == Kind.STEP:
            owner.step_received(self._decode_step.decode(buffers))
        elif kind == Kind.TAKEN:
            owner.taken(MsgpackDecoder(Taken).decode(buffers))
        elif kind == Kind.REJECT:
            owner.rejected(MsgpackDecoder(Rejection).decode(buffers))
        elif kind == Kind.WARMED:
            owner.warmed(MsgpackDecoder(Warmed).decode(buffers))
        elif kind == Kind.TRANSFERRED:
            owner.transferred(MsgpackDecoder(list[Transferred]).decode(buffers))
        elif kind == Kind.HOLDINGS:
            owner.holds(MsgpackDecoder(Holdings).decode(buffers))
        elif kind == Kind.ENDED:
            owner.engine_ended(MsgpackDecoder(EngineExit).decode(buffers))
        else:
            raise ProtocolError(f"a replica does not send {kind.name} here")

    def ended(self) -> None:
        if self._owner is not None:
            self._owner.replica_gone(self.closed_because)
        elif not self.welcome.done():
            self.welcome.set_exception(ChannelClosed(self.closed_because))


async def listen(
    host: str,
    secret: str,
    owner: RouterRequests,
    *,
    tls: Tls | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> tuple[asyncio.AbstractServer, int]:
    """Lets routers in on a free port of `host`; returns the server and the port.

    A router that takes nothing of what it is sent for `stall_timeout_s` is cut off.
    """
    lobby = Lobby()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    # The connections that it accepts have it too.
    _notice_silence(listener, stall_timeout_s)
    port: int = listener.getsockname()[1]

    def new_end() -> RouterEnd:
        return RouterEnd(secret, owner, lobby, stall_timeout_s)

    if tls is not None:
        return TlsServer(listener, new_end, tls, handshake_timeout_s=GREETING_TIMEOUT_S), port
    return await asyncio.get_running_loop().create_server(new_end, sock=listener), port


async def connect(
    address: tuple[str, int],
    *,
    secret: str,
    router_id: str,
    replica_id: str,
    welcomed: Callable[[ReplicaEnd, ReplicaFacts], _Owner],
    tls: Tls | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> _Owner:
    """Connects to the replica whose engine is `replica_id`, and is let in.

    `welcomed` makes who is told all else that the replica says.

    Raises:
        OSError: nobody listens there.
        ChannelClosed: we were not let in, or it is another one; the text says why.
        TimeoutError: it did not answer.
    """
    greeting = ClientGreeting(
        router_id, replica_id, secret=secret, purpose=PURPOSE, version=PROTOCOL_VERSION
    )
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(GREETING_TIMEOUT_S):
        make: Callable[[], Any] = lambda: ReplicaEnd(greeting, welcomed, stall_timeout_s)  # noqa: E731
        context = None if tls is None else tls.client()
        _, end = await loop.create_connection(make, *address, ssl=context)
        try:
            owner: _Owner = await end.welcome
            return owner
        except BaseException:
            end.close("the greeting failed")
            raise


def _notice_silence(sock: Any, timeout_s: float) -> None:
    """Has the kernel end a connection whose other side acknowledges nothing for that long."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
