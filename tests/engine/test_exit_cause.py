"""What is said of an engine that has ended."""

import subprocess
import sys

import pytest

from engine.exit_cause import MAX_TEXT, explain_exit, last_words

RAISED = """\
(EngineCore pid=7) ERROR 11-29 21:02:14 [core.py:1499] EngineCore encountered a fatal error.
(EngineCore pid=7) ERROR 11-29 21:02:14 [core.py:1499] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-29 21:02:14 [core.py:1499]   File "worker.py", line 3, in load
(EngineCore pid=7) ERROR 11-29 21:02:14 [core.py:1499] ValueError: no such weights:
(EngineCore pid=7) ERROR 11-29 21:02:14 [core.py:1499] here
(EngineCore pid=7) INFO 11-29 21:02:14 [core.py:1499] [shutdown] EngineCore: exiting busy loop
INFO 2026-11-29 21:02:14,001 pdserve_decode abc -- Error: this is the replica's
"""
CRASHED = """\
Fatal Python error: Illegal instruction

Thread 0x00007f (most recent call first):
  File "/lib/threading.py", line 327 in wait

Current thread 0x00007e (most recent call first):
  File "/vllm/_custom_ops.py", line 12 in cpu_attention
  File "/vllm/cpu_attn.py", line 34 in forward
"""
UNCAUGHT = "(Worker_TP1 pid=9) torch.OutOfMemoryError: out of memory, by 1 GiB\n"

ROWS = [
    pytest.param(
        -4, CRASHED, "SIGILL",
        "the engine was ended by SIGILL (this processor has not, or may not use, an instruction of"
        " vLLM's kernels); it said last: Illegal instruction, in cpu_attention"
        " (/vllm/_custom_ops.py, line 12)",
        id="crashed",
    ),
    pytest.param(
        1, RAISED + CRASHED, "SIGILL", "the engine was ended by SIGILL (", id="one-rank-crashed"
    ),
    pytest.param(
        -9, "", "SIGKILL",
        "the engine was ended by SIGKILL (somebody killed it, or the system did because memory ran"
        " out)",
        id="killed",
    ),
    pytest.param(
        -9, RAISED, "SIGKILL", "the engine was ended by SIGKILL (somebody killed it, or the system"
        " did because memory ran out)",
        id="killed-long-after-an-error",
    ),
    pytest.param(
        1, RAISED, "error",
        "the engine ended with exit status 1; it said last: ValueError: no such weights:",
        id="raised",
    ),
    pytest.param(
        None, UNCAUGHT, "error",
        "the engine ended with an error; it said last: torch.OutOfMemoryError: out of memory, by"
        " 1 GiB",
        id="about-to-end",
    ),
    pytest.param(0, "", "error", "the engine ended with exit status 0", id="nothing-said"),
    pytest.param(-77, "", "signal_77", "the engine was ended by signal_77", id="unknown-signal"),
]  # fmt: skip


@pytest.mark.parametrize(("exit_code", "output", "cause", "text"), ROWS)
def test_explain_exit(exit_code: int | None, output: str, cause: str, text: str) -> None:
    explained = explain_exit(exit_code, output)
    assert explained.cause == cause
    assert explained.text.startswith(text)


def test_the_text_is_one_line_of_bounded_length() -> None:
    text = explain_exit(1, f"(EngineCore pid=1) ValueError: {'x' * 10_000}\n").text
    assert len(text) == MAX_TEXT
    assert "\n" not in text


def test_what_nobody_of_the_engine_said_is_not_quoted() -> None:
    assert last_words("ValueError: of the replica\n(EngineCore pid=1) INFO all is well\n") == ""


OUTPUT = "import engine.exit_cause as it, os; print(repr(it.read_own_output()))"


@pytest.mark.parametrize("shell", ["{python} > {file} 2>&1", "{python} | cat > {file}"])
def test_output_is_read_from_files_alone(shell: str, tmp_path: object) -> None:
    file = f"{tmp_path}/out"
    code = f"import sys; sys.stderr.write('said before'); sys.stderr.flush(); {OUTPUT}"
    python = f'{sys.executable} -c "{code}"'
    subprocess.run(["sh", "-c", shell.format(python=python, file=file)], check=True)
    with open(file) as output:
        said = output.read()
    assert ("'said before" in said) == (">" in shell and "|" not in shell)
