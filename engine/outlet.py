"""Each step's outputs, from the engine core's thread straight into the replica's event loop.

vLLM has a thread pass them on, which must wait until the engine's thread lets go of Python's lock,
and zmq carry them, with one more thread at either end: on few cores that is up to half a
millisecond for a token. Here the engine's own thread writes them to a Unix socket. All else
(answers to calls, the engine's death) stays with zmq.

Owns both ends of that socket. The engine core connects to the process that has started it, which
lets in nobody of another user: the address can be seen by everybody on the machine.
"""

import asyncio
import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from engine.errors import ChannelClosed, EngineInternalsChanged, ProtocolError
from engine.internals import PINS
from engine.wire import FrameReader, Kind, pack_frame

_ADDRESS = "pdserve_outlet"
"""Set on a part of the engine's configuration, with which it reaches the engine core; of the whole
vLLM makes copies (see `kvtransfer.credentials`)."""

_SMALL_BYTES = 64 * 1024
_MAX_WAITING = 16
"""Connections that are not accepted yet."""
_PATIENCE_S = 10.0
"""For the thread that lets the engine core in, once that has connected."""
_PAUSE_S = 0.1
"""Before the next try where the process has no file left for a connection."""
_CLOSED = "the replica's end was closed"

_PID_UID_GID = struct.Struct("3i")


class Outlet:
    """Mixed into vLLM's scheduler. Owns the engine core's end."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outlet: socket.socket | None = None
        self._outlet_encoder = MsgpackEncoder()
        if address := getattr(self.vllm_config.scheduler_config, _ADDRESS, None):
            self._outlet = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._outlet.connect(address)

    def update_from_output(
        self: Any, scheduled: SchedulerOutput, computed: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Sends what the step put out, which leaves nothing for vLLM to pass on.

        Waits where the replica does not read.

        Raises:
            OSError: the replica is gone.
        """
        steps: dict[int, EngineCoreOutputs]
        steps = super().update_from_output(scheduled, computed)  # type: ignore[misc]
        if self._outlet is None:
            return steps
        for step in steps.values():
            for piece in _joined(pack_frame(Kind.STEP, self._outlet_encoder.encode(step))):
                self._outlet.sendall(piece)
        return {}

    def shutdown(self: Any) -> None:
        if self._outlet is not None:
            self._outlet.close()
        super().shutdown()  # type: ignore[misc]


class Inlet(asyncio.Protocol):
    """The replica's end: puts the steps where vLLM's client would have put them."""

    def __init__(self, config: VllmConfig) -> None:
        """To be made before an engine core is started with `config`, which takes the address."""
        self._reader = FrameReader()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._steps: asyncio.Queue[EngineCoreOutputs | Exception] | None = None
        self._transport: asyncio.Transport | None = None
        self._is_held = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Linux's abstract namespace: there is nothing to delete afterwards.
        address = f"\0pdserve-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener.bind(address)
        self._listener.listen(_MAX_WAITING)
        setattr(config.scheduler_config, _ADDRESS, address)
        self._is_closed = False
        self._num_strangers = 0
        self._engine_core: Future[socket.socket] = Future()
        # At once: where others fill the queue of those that wait, the engine core would hang.
        self._accepting = threading.Thread(target=self._accept, daemon=True, name="engine-inlet")
        self._accepting.start()

    async def open(self, core: AsyncMPClient) -> None:
        """Lets the engine core in; it has connected when it was started.

        Raises:
            EngineInternalsChanged: this vLLM's client keeps its steps elsewhere.
            ProtocolError: it has not.
            ChannelClosed: this end was closed.
        """
        if not isinstance(getattr(core, "outputs_queue", None), asyncio.Queue):
            raise EngineInternalsChanged(f"AsyncMPClient has no outputs_queue: {PINS} has")
        self._steps = core.outputs_queue
        try:
            async with asyncio.timeout(_PATIENCE_S):
                engine_core = await asyncio.wrap_future(self._engine_core)
        except TimeoutError:
            told = f"the engine core has not connected, and {self._num_strangers} of other users"
            raise ProtocolError(f"{told} have") from None
        if not self._is_closed:
            # The transport's from here on, and nobody else's to close.
            engine_core = socket.socket(fileno=engine_core.detach())
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self, engine_core)
        if self._is_closed:
            raise ChannelClosed(_CLOSED)

    def _accept(self) -> None:
        """Waits for the connection of this user's process; turns those of others away."""
        with self._listener:
            while not self._is_closed:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    time.sleep(_PAUSE_S)
                    continue
                if _user_of(connection) == os.getuid():
                    self._let_in(connection)
                    return
                connection.close()
                self._num_strangers += 1

    def _let_in(self, connection: socket.socket) -> None:
        try:
            self._engine_core.set_result(connection)
        except InvalidStateError:
            # Nobody waits for it any more.
            connection.close()

    @property
    def is_held(self) -> bool:
        return self._is_held

    def hold(self) -> None:
        """Takes nothing more, so that the engine core waits before its next step but one."""
        self._is_held = True
        if self._transport is not None:
            self._transport.pause_reading()

    def let_go(self) -> None:
        self._is_held = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """Ends the connection, if there is one."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # It may be closed already.
            self._listener.shutdown(socket.SHUT_RDWR)
        try:
            self._engine_core.set_exception(ChannelClosed(_CLOSED))
        except InvalidStateError:
            if not self._engine_core.cancelled() and self._engine_core.exception() is None:
                # It was let in and never heard, or it is the transport's.
                self._engine_core.result().close()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._is_closed:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        assert self._steps is not None
        try:
            for _, buffers in self._reader.feed(data):
                step: EngineCoreOutputs = self._decoder.decode(buffers)
                if step.outputs or step.scheduler_stats:
                    self._steps.put_nowait(step)
        except Exception as error:
            # Whoever waits for the next step gets it, as vLLM's client does with its own errors.
            self._steps.put_nowait(error)


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PID_UID_GID.size)
    uid: int = _PID_UID_GID.unpack(credentials)[1]
    return uid


def _joined(pieces: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """A frame in as few writes as it takes without copying what is large."""
    small: list[memoryview] = []
    for piece in pieces:
        if piece.nbytes <= _SMALL_BYTES:
            small.append(piece)
            continue
        yield b"".join(small)
        yield piece
        small = []
    yield b"".join(small)
