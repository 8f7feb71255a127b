"""Which model `pdserve up` serves: the configured one, or the tiny one where that cannot be had.

Owns that choice, made once, so that the router and all engines agree. Never starts anything.
"""

from collections.abc import Callable
from pathlib import Path

import yaml

from cluster.errors import StartError
from cluster.serve_file import ServeFile, load_serve_file
from engine.demo_model import MAX_POSITIONS
from engine.errors import ModelUnavailable
from engine.models import resolve_model

FALLBACK = "demo"


def prepare_model(file: ServeFile, folder: Path, say: Callable[[str], None]) -> ServeFile:
    """Makes the config's model ready if it is built in; returns the file to serve.

    Where the model cannot be had, that is another file, in `folder`, with the tiny model under the
    same name.

    Raises:
        StartError: neither can be had.
    """
    try:
        resolve_model(file.config.model, say)
    except ModelUnavailable as error:
        if file.config.model == FALLBACK:
            raise StartError(str(error)) from None
        name = file.config.public_name
        say(f"serving the tiny model {FALLBACK} as {name}, which answers noise: {error}")
        return prepare_model(_with_model(file, FALLBACK, folder), folder, say)
    return file


def _with_model(file: ServeFile, model: str, folder: Path) -> ServeFile:
    document = yaml.safe_load(file.path.read_text(encoding="utf-8"))
    args = document["applications"][0]["args"]
    args |= {"model": model, "served_name": file.config.public_name}
    for section in (args, args.get("prefill"), args.get("decode")):
        engine = (section or {}).get("engine") or {}
        if isinstance(engine.get("max_model_len"), int):
            engine["max_model_len"] = min(engine["max_model_len"], MAX_POSITIONS)
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return load_serve_file(path)
