"""NIXL agents as the connector has them: their memory, and one transfer.

Owns agents and descriptor lists. Never takes the time.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.kv_transfer_memory import Case, address_of
from kvtransfer.agent import replace_spinning_agent

_GIVE_UP_S = 60.0
_NUM_THREADS = 4  # vLLM's own choice.
_WATCHED_S = 0.001
_PAUSE_FRACTION = 0.02
"""A transfer is watched for so long; then it is looked at after pauses of so much of its time. An
engine looks once a step, and a loop without pauses takes a core from the threads that copy."""


class TransferFailedError(Exception):
    """NIXL ended a transfer with an error, or not at all."""


class NixlSide:
    """One process's agent, with all of its memory registered."""

    def __init__(self, memory: torch.Tensor) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        config = nixl_agent_config(num_threads=_NUM_THREADS)
        self.agent: Any = nixl_agent(str(uuid.uuid4()), config)
        replace_spinning_agent(self.agent, memory.device.type)
        self.kind = "VRAM" if memory.is_cuda else "DRAM"
        self.device = max(memory.get_device(), 0)
        self.address = address_of(memory)
        self._num_bytes = memory.numel()
        region = [(self.address, self._num_bytes, self.device, "")]
        self.agent.register_memory(self.agent.get_reg_descs(region, self.kind))

    def metadata(self) -> bytes:
        encoded: bytes = self.agent.get_agent_metadata()
        return encoded

    def descriptors(self, case: Case, address: int, device: int) -> Any:
        """Every descriptor of memory at `address`, in order; transfers choose by number."""
        count = self._num_bytes // case.descriptor_bytes
        addresses = address + np.arange(count, dtype=np.uint64) * case.descriptor_bytes
        table = np.stack(
            [
                addresses,
                np.full(count, case.descriptor_bytes, dtype=np.uint64),
                np.full(count, device, dtype=np.uint64),
            ],
            axis=1,
        ).astype(np.uint64)
        return self.agent.get_xfer_descs(table, self.kind)


class NixlPeer:
    """The other process, as the measuring one sees it."""

    def __init__(self, side: NixlSide, metadata: bytes, address: int, device: int) -> None:
        self._side, self._address, self._device = side, address, device
        self._name = side.agent.add_remote_agent(metadata)

    def transfer(self, case: Case, operation: Literal["READ", "WRITE"]) -> Callable[[], None]:
        """Prepared as vLLM does once for each pair; the call is one request's.

        Raises TransferFailedError.
        """
        side = self._side
        here = side.agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", side.descriptors(case, side.address, side.device)
        )
        there = side.agent.prep_xfer_dlist(
            self._name, side.descriptors(case, self._address, self._device)
        )
        return lambda: self._run(operation, (here, case.here), (there, case.there))

    def _run(
        self,
        operation: str,
        here: tuple[Any, Sequence[int]],
        there: tuple[Any, Sequence[int]],
    ) -> None:
        agent = self._side.agent
        indices = [np.asarray(numbers, dtype=np.int32) for _, numbers in (here, there)]
        handle = agent.make_prepped_xfer(operation, here[0], indices[0], there[0], indices[1])
        state = agent.transfer(handle)
        begin_s = time.perf_counter()
        while state == "PROC":
            if (taken_s := time.perf_counter() - begin_s) > _GIVE_UP_S:
                raise TransferFailedError(f"{operation} did not end in {_GIVE_UP_S:.0f} s")
            if taken_s > _WATCHED_S:
                time.sleep(taken_s * _PAUSE_FRACTION)
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TransferFailedError(f"{operation} ended as {state}")
