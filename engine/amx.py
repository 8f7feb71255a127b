"""AMX, the tile registers of newer Xeons, which Linux gives a process only where it asks for them.

vLLM's CPU kernels use them wherever the processor has them, and ask for nothing; the first tile
instruction then ends the process by SIGILL. The permission is a process's own: its threads and
forks share it, a program that it starts does not. Owns the asking.
See https://docs.kernel.org/arch/x86/xstate.html.
"""

import logging

import torch

logger = logging.getLogger(__name__)


def request_amx() -> bool:
    """Whether this process may use AMX; where it may not, vLLM takes other kernels from now on.

    To be called in every process that chooses or runs kernels, before it does either.
    """
    if not torch.cpu._is_amx_tile_supported():
        return False
    if torch.cpu._init_amx():
        return True
    logger.warning(
        "this processor has AMX and the operating system does not let us use it: the engine takes"
        " other kernels, which are slower"
    )
    # What vLLM asks before it takes an AMX kernel.
    torch.cpu._is_amx_tile_supported = torch.cpu._is_amx_fp16_supported = _is_refused
    return False


def _is_refused() -> bool:
    return False
