"""The models that are built in: their names, and how each becomes a folder that vLLM loads.

Owns the names. Never loads a model.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.demo_model import write_demo_model
from engine.errors import ModelUnavailable
from engine.model_cache import cache_dir, is_whole
from engine.smollm2 import write_smollm2

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Takes a line for whoever waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInModel:
    """A model that is made on first use, in `folder` of the user's cache."""

    folder: str
    write: Callable[[Path, Say], None]
    question: str | None = None
    """What to ask it to see that it works; None where it has no sensible answers."""


def _write_demo(target: Path, say: Say) -> None:
    say(f"building the demo model in {target}")
    write_demo_model(target)


BUILT_IN: Mapping[str, BuiltInModel] = {
    "demo": BuiltInModel(folder="demo-model", write=_write_demo),
    "smollm2": BuiltInModel(
        folder="smollm2-135m-instruct",
        write=write_smollm2,
        # One that it is sure of, in any dtype: France it sometimes takes for a question in French.
        question="What is the capital of Japan?",
    ),
}
"""By the name that stands for a model wherever a path or a hub id may stand."""


def model_folder(name: str) -> Path:
    """Where a built-in model lies once it is made."""
    return cache_dir() / BUILT_IN[name].folder


def resolve_model(model: str, say: Say = logger.info) -> str:
    """Turns the configured model into what vLLM loads; a built-in one is made if missing.

    Raises:
        ModelUnavailable: it cannot be had here; one line that says why and what to do.
    """
    if model not in BUILT_IN:
        return model
    target = model_folder(model)
    if not is_whole(target):
        try:
            timed = _timed(say)
            BUILT_IN[model].write(target, timed)
            timed(f"{model} is made")
        except OSError as error:
            raise ModelUnavailable(
                f"cannot write {target}: {error.strerror or error}; set XDG_CACHE_HOME to a folder "
                "that has room and may be written"
            ) from error
    return str(target)


def _timed(say: Say) -> Say:
    """The same, with the seconds since now before each line."""
    start_s = time.monotonic()
    return lambda line: say(f"{time.monotonic() - start_s:4.0f} s  {line}")
