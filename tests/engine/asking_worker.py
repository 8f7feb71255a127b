"""The worker as it ships, which can also be asked what its process may use."""

import ctypes

import torch

from engine.cpu_worker import CPUWorker

_SYS_ARCH_PRCTL = 158
_ARCH_GET_XCOMP_PERM = 0x1022
_XTILEDATA = 18


class AskingWorker(CPUWorker):
    """Named in `worker_cls`."""

    def may_use_amx(self) -> bool:
        """What the operating system says."""
        permitted = ctypes.c_uint64()
        arguments = (_SYS_ARCH_PRCTL, _ARCH_GET_XCOMP_PERM, ctypes.byref(permitted))
        assert ctypes.CDLL(None).syscall(*arguments) == 0
        return bool(permitted.value >> _XTILEDATA & 1)

    def takes_amx_kernels(self) -> bool:
        """What vLLM asks before it takes one."""
        return torch.cpu._is_amx_tile_supported()
