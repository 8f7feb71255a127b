"""The line between a replica and its engine core: requests in, each step's outputs out.

vLLM has zmq carry both, with a thread at either end of either way, and each thread waits for a core
and for Python's lock: on few cores up to half a millisecond for a token. Here the replica's event
loop writes requests to a Unix socket, one thread of the engine core reads them into the engine's
queue, and the engine's own thread writes what a step puts out. All else (calls and their answers,
the engine's death) stays with zmq.

Owns both ends of that socket. The engine core connects to the process that has started it, which
lets in nobody of another user.
"""

import asyncio
import logging
import os
import queue
import secrets
import socket
import struct
import threading
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from engine.errors import EngineInternalsChanged, ProtocolError
from engine.internals import PINS
from engine.wire import MAX_FRAME_BYTES, FrameReader, Kind, pack_frame

logger = logging.getLogger(__name__)

_ADDRESS = "pdserve_line"
"""Set on the engine's configuration, with which it reaches the engine core."""

_PID_UID_GID = struct.Struct("3i")
_READ_BYTES = 1 << 18


class CoreEnd:
    """Mixed into vLLM's scheduler. Owns the engine core's end."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._line: socket.socket | None = None
        self._line_encoder = MsgpackEncoder()
        if address := getattr(self.vllm_config, _ADDRESS, None):
            self._line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._line.connect(address)
            take_requests_from(self._line)

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
        if self._line is None:
            return steps
        for step in steps.values():
            self._line.sendall(pack_frame(Kind.STEP, self._line_encoder.encode(step)))
        return {}

    def shutdown(self: Any) -> None:
        if self._line is not None:
            self._line.close()
        super().shutdown()  # type: ignore[misc]


def take_requests_from(line: socket.socket) -> None:
    """To be called in the engine core's process, before it has a thread for what zmq brings.

    With that thread begins the one that reads the line: before, nothing could take a request.
    """
    take_from_zmq = EngineCoreProc.process_input_sockets

    def process_input_sockets(core: EngineCoreProc, *args: Any, **kwargs: Any) -> None:
        for name in ("input_queue", "aborts_queue"):
            if not isinstance(getattr(core, name, None), queue.Queue):
                raise EngineInternalsChanged(f"EngineCoreProc has no {name}: {PINS} has")
        threading.Thread(target=_read, args=(core, line), name="line", daemon=True).start()
        take_from_zmq(core, *args, **kwargs)

    EngineCoreProc.process_input_sockets = process_input_sockets


def _read(core: EngineCoreProc, line: socket.socket) -> None:
    """Puts what comes where vLLM puts what zmq brings, until the replica is gone."""
    decode_request = MsgpackDecoder(EngineCoreRequest)
    decode_ids = MsgpackDecoder(list[str])
    reader = FrameReader()
    reader.max_bytes = MAX_FRAME_BYTES
    try:
        while data := line.recv(_READ_BYTES):
            for kind, buffers in reader.feed(data):
                if kind == Kind.ADD:
                    _add(core, decode_request.decode(buffers))
                else:
                    _abort(core, decode_ids.decode(buffers))
    except Exception:
        # An engine that heard of no request any more would look well: it ends instead.
        logger.exception("the line to the replica has broken")
        core.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b""))


def _add(core: EngineCoreProc, request: EngineCoreRequest) -> None:
    try:
        prepared = core.preprocess_add_request(request)
    except Exception:
        core._handle_request_preproc_error(request)
    else:
        core.input_queue.put_nowait((EngineCoreRequestType.ADD, prepared))


def _abort(core: EngineCoreProc, request_ids: list[str]) -> None:
    # vLLM's engine looks into the first between two steps, and into the second in due order.
    core.aborts_queue.put_nowait(request_ids)
    core.input_queue.put_nowait((EngineCoreRequestType.ABORT, request_ids))


class HostEnd(asyncio.Protocol):
    """The replica's end: puts the steps where vLLM's client would have put them."""

    def __init__(self, config: VllmConfig) -> None:
        """To be made before an engine core is started with `config`, which takes the address."""
        self._reader = FrameReader()
        self._reader.max_bytes = MAX_FRAME_BYTES
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._encoder = MsgpackEncoder()
        self._steps: asyncio.Queue[EngineCoreOutputs | Exception] | None = None
        self._transport: asyncio.Transport | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Linux's abstract namespace: there is nothing to delete afterwards.
        address = f"\0pdserve-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener.bind(address)
        self._listener.listen(1)
        setattr(config, _ADDRESS, address)

    async def open(self, core: AsyncMPClient) -> None:
        """Lets the engine core in; it has connected when it was started.

        Raises:
            BlockingIOError: it has not.
            EngineInternalsChanged: this vLLM's client keeps its steps elsewhere.
            ProtocolError: whoever has connected is of another user.
        """
        if not isinstance(getattr(core, "outputs_queue", None), asyncio.Queue):
            raise EngineInternalsChanged(f"AsyncMPClient has no outputs_queue: {PINS} has")
        self._steps = core.outputs_queue
        with self._listener:
            self._listener.setblocking(False)
            engine_core, _ = self._listener.accept()
        credentials = engine_core.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _PID_UID_GID.size
        )
        _, uid, _ = _PID_UID_GID.unpack(credentials)
        if uid != os.getuid():
            engine_core.close()
            raise ProtocolError(f"user {uid} has connected in the engine core's place")
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: self, engine_core)

    def add(self, request: EngineCoreRequest) -> None:
        """Sends a request. One for an engine core that has ended goes nowhere.

        Raises:
            TypeError, ValueError: it cannot be encoded.
            ProtocolError: it is too large.
        """
        self._send(Kind.ADD, request)

    def abort(self, request_ids: list[str]) -> None:
        """Ends requests that were sent before, in whatever state they are."""
        self._send(Kind.ABORT, request_ids)

    def close(self) -> None:
        """Ends the connection, if there is one."""
        self._listener.close()
        if self._transport is not None:
            self._transport.abort()

    def _send(self, kind: Kind, message: object) -> None:
        assert self._transport is not None, "the engine core has not been let in"
        if not self._transport.is_closing():
            self._transport.write(pack_frame(kind, self._encoder.encode(message)))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

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
