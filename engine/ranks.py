"""The ranks of an engine on a node without its core: vLLM calls that headless.

Owns these worker processes, from the start of the first to the end of any. Never schedules, and
never hears of a request but from the engine core.
"""

import logging
from multiprocessing.connection import wait

from vllm import AsyncEngineArgs
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from engine.exit_cause import EngineExit, explain_exit, read_own_output
from engine.host import engine_config
from engine.internals import check_internals
from kvtransfer.credentials import Credentials

logger = logging.getLogger(__name__)

_REAPED_S = 5.0
"""A rank has closed its pipe moments before it has ended, and how it does is known only then."""


def run_ranks(args: AsyncEngineArgs, credentials: Credentials | None = None) -> EngineExit:
    """Runs this node's ranks until one of them ends, and says how it did; the others end then.

    Raises:
        EngineInternalsChanged: this vLLM is not the one we call into.
        ValueError, RuntimeError: vLLM refused the arguments.
    """
    check_internals()
    config = engine_config(args, credentials, is_headless=True)
    try:
        executor = MultiprocExecutor(config, monitor_workers=False)
    except Exception:
        # It does not say more than that; the ranks have written why.
        logger.exception("the ranks on this node did not start")
        return explain_exit(None, read_own_output())
    try:
        processes = {each.proc.sentinel: each.proc for each in executor.workers}
        (first, *_) = wait(list(processes))
        processes[first].join(_REAPED_S)
        return explain_exit(processes[first].exitcode, read_own_output())
    finally:
        executor.shutdown()
