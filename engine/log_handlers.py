"""Serve's log handlers, in a process in which other libraries configure logging.

Whoever calls `logging.config.dictConfig` (vLLM and NIXL do, when they are imported) closes the
handlers of everybody in the process. Serve's then has lost its file, and a controller that starts
again, asking each replica for the path of its log, takes that for a broken replica and ends it:
all of them at once. Owns nothing; changes what that call does here.
"""

import logging.config

CLOSES_HANDLERS = "_clearExistingHandlers"


def keep_log_handlers() -> None:
    """From now on nobody in this process closes another's handlers. To be called before imports."""
    setattr(logging.config, CLOSES_HANDLERS, _do_nothing)


def _do_nothing() -> None:
    pass
