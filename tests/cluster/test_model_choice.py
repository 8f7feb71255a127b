"""The model that `pdserve up` serves where the configured one cannot be had."""

from pathlib import Path

import pytest
import yaml

from cluster.errors import StartError
from cluster.model_choice import prepare_model
from cluster.serve_file import load_serve_file
from engine.demo_model import MAX_POSITIONS

CONFIG = """\
http_options: {port: 8123}
applications:
  - name: mine
    import_path: cluster.app:build
    args: {model: smollm2, decode: {replicas: 2}, engine: {max_model_len: 512}}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config that asks for smollm2, where no index has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_tiny_model_takes_its_place_under_its_name(config: Path, tmp_path: Path) -> None:
    said: list[str] = []
    asked = load_serve_file(config)
    served = prepare_model(asked, tmp_path, said.append)

    downloading, instead, building, made = said
    assert " s  downloading " in downloading
    assert instead.startswith(
        "serving the tiny model demo as smollm2, which answers noise: cannot download smollm2: "
    )
    assert " s  building the demo model in " in building
    assert made.endswith(" s  demo is made")

    assert (served.config.model, served.config.public_name) == ("demo", "smollm2")
    # All else is as it was, also in the file that Serve reads.
    assert (served.url, served.app_name) == (asked.url, asked.app_name)
    assert served.config == asked.config.model_copy(
        update={"model": "demo", "served_name": "smollm2"}
    )
    args = yaml.safe_load(served.path.read_text())["applications"][0]["args"]
    assert args["decode"] == {"replicas": 2}


def test_served_name_is_kept(config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG.replace("smollm2", "smollm2, served_name: chat"))
    served = prepare_model(load_serve_file(config), tmp_path, print)
    assert served.config.public_name == "chat"


def test_a_model_that_can_be_had_is_served_from_the_file_itself(
    config: Path, tmp_path: Path
) -> None:
    config.write_text(CONFIG.replace("smollm2", "demo"))
    asked = load_serve_file(config)
    assert prepare_model(asked, tmp_path, print) is asked


def test_where_there_is_neither(config: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(StartError, match=r"cannot write .*demo-model: "):
        prepare_model(load_serve_file(config), tmp_path, print)


def test_it_has_room_for_less_than_was_asked_for(config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG.replace("max_model_len: 512", "max_model_len: 8192"))
    served = prepare_model(load_serve_file(config), tmp_path, lambda line: None)
    assert served.config.engine == {"max_model_len": MAX_POSITIONS}
