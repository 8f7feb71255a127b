"""What the `pdserve` command says of itself."""

import re

import pytest

from cluster.cli import main


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_command_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys)
    commands = re.findall(r"^    ([a-z-]+)", text, flags=re.MULTILINE)

    assert {"check", "up", "metrics-reference"} <= set(commands)
    assert "\nexamples:\n  pdserve " in text
    for command in commands:
        examples = told(capsys, command).partition("\nexamples:\n")[2].splitlines()
        assert examples
        assert all(f"pdserve {command}" in line for line in examples)
