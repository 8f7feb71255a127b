"""The demo as it ships, started as a newcomer starts it, and one plain vLLM server beside it.

Owns their commands. What is asked of them is the business of the tests.
"""

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servers import Server, await_line, plain_command, plain_environment, started

from benchmarks.systems import CPU_WORKER
from cluster.ports import LOCALHOST, pick_free
from cluster.serve_file import load_serve_file
from engine.models import resolve_model

CONFIG = Path(__file__).parents[2] / "cluster" / "configs" / "demo.yaml"
MODEL = "smollm2"
READY, TRY = "ready in", "  try  "


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """Both servers, ready."""

    cluster: Server
    plain: Server

    @property
    def command(self) -> list[str]:
        """What the demo says one should try."""
        output = self.cluster.log.read_text(errors="replace")
        (line,) = (line for line in output.splitlines() if line.startswith(TRY))
        return shlex.split(line.removeprefix(TRY))


@contextlib.contextmanager
def demo_and_plain(folder: Path) -> Iterator[Demo]:
    """Starts both and waits until they can be asked."""
    file = load_serve_file(CONFIG)
    # First the model: both servers need it.
    resolve_model(MODEL)
    (port,) = pick_free([None])
    # In bfloat16, on a processor with AMX, its first request would end it.
    plain = plain_command(MODEL, "--worker-cls", CPU_WORKER, port=port)
    up = [str(Path(sys.executable).parent / "pdserve"), "up", str(CONFIG)]
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(started(up, file.url, {}, folder / "demo.log"))
        bare = stack.enter_context(
            started(plain, f"http://{LOCALHOST}:{port}", plain_environment(), folder / "bare.log")
        )
        await_line(cluster, TRY)
        await_line(bare, "Application startup complete")
        yield Demo(cluster=cluster, plain=bare)
