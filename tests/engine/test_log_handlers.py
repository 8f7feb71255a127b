"""Serve's log handler is open after others have configured logging."""

import subprocess
import sys

import pytest

# As Serve sets it up in a replica, and as its controller later asks for the file.
CODE = """\
import logging
from logging.handlers import MemoryHandler
handler = MemoryHandler(10, target=logging.FileHandler({path!r}))
logging.getLogger("ray.serve").addHandler(handler)
{keep}
import logging.config
logging.config.dictConfig({{"version": 1, "disable_existing_loggers": False}})
print(handler.target is not None)
"""
KEEP = "from engine.log_handlers import keep_log_handlers; keep_log_handlers()"


@pytest.mark.parametrize(("keep", "is_open"), [(KEEP, True), ("", False)])
def test_handlers_stay_open(keep: str, is_open: bool, tmp_path: object) -> None:
    code = CODE.format(path=f"{tmp_path}/log", keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{is_open}\n"
