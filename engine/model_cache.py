"""The user's cache folder, and folders in it that are whole or not there.

Owns where models lie that are made here. Never knows what is in them.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DRAFT = ".draft-"
_MANIFEST = "pdserve-files.json"
"""The sizes of all other files of the folder, by name."""
_STALE_S = 24 * 3600.0


def cache_dir() -> Path:
    """Where this user's models and logs lie; not made if missing."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "pdserve"


def is_whole(target: Path) -> bool:
    """Whether a model is there, with all of its files at their full sizes."""
    try:
        sizes = json.loads((target / _MANIFEST).read_text())
        return bool(sizes == _sizes(target))
    except (OSError, ValueError):
        return False


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write a model to; it becomes `target` when the block ends without an error.

    Several processes may do this at once. The first to end wins, and the others' folders go: an
    engine may be loading the first one by then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    draft = Path(tempfile.mkdtemp(prefix=f"{_DRAFT}{target.name}-", dir=target.parent))
    try:
        yield draft
        (draft / _MANIFEST).write_text(json.dumps(_sizes(draft), indent=2) + "\n")
        draft.chmod(0o755)
        if not is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
        try:
            draft.rename(target)
        except OSError:
            if not is_whole(target):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` that goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=parent) as folder:
        yield Path(folder)


def _remove_stale(parent: Path) -> None:
    """Removes what processes have left that were killed while they made a model."""
    for folder in parent.glob(f"{_DRAFT}*"):
        with suppress(FileNotFoundError):  # another process removes it as well
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        file.name: file.stat().st_size
        for file in sorted(folder.iterdir())
        if file.name != _MANIFEST
    }
