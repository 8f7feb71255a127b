"""All that an object keeps alive, whatever it is called and however it got there."""

import asyncio
import gc
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_NOT_ITS_OWN = (ModuleType, type, asyncio.AbstractEventLoop, logging.Logger)


def reachable(*roots: object, without: tuple[type, ...] = ()) -> Iterator[Any]:
    """Everything reachable from `roots`, but not through modules, classes and the event loop,
    which know everybody, nor through instances of `without`."""
    seen = {id(vars(module)) for module in list(sys.modules.values())}
    waiting = list(roots)
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (*_NOT_ITS_OWN, *without)):
            continue
        seen.add(id(each))
        yield each
        waiting += gc.get_referents(each)
