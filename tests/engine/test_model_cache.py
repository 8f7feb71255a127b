"""Folders of models: whole or not there, also when several processes write the same one."""

import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from engine.demo_model import write_demo_model
from engine.errors import ModelUnavailable
from engine.model_cache import cache_dir, is_whole, whole_folder
from engine.models import resolve_model


def write(target: Path, text: str, together: Barrier) -> None:
    with whole_folder(target) as draft:
        (draft / "config.json").write_text(text)
        (draft / "weights").write_text(text)
        together.wait()


def test_two_processes_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    writers = [context.Process(target=write, args=(target, text, together)) for text in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(target.parent.iterdir()) == [target]
    assert (target / "config.json").read_text() == (target / "weights").read_text()


def test_first_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as late:
        (late / "config.json").write_text("late")
        with whole_folder(target) as early:
            (early / "config.json").write_text("early")
    assert (target / "config.json").read_text() == "early"


def test_remains_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "half").touch()
    with whole_folder(target) as draft:
        (draft / "config.json").touch()
    assert is_whole(target)
    assert not (target / "half").exists()


@pytest.mark.parametrize("damage", ["weights", "config.json"])
def test_a_damaged_one_is_made_again(damage: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    for _ in range(2):
        with whole_folder(target) as draft:
            (draft / "config.json").write_text("{}")
            (draft / "weights").write_text("0" * 100)
        assert is_whole(target)
        (target / damage).write_text("0")
        assert not is_whole(target)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "model") as draft:
        draft.mkdir()
    assert list(tmp_path.iterdir()) == []


def test_demo_model_replaces_its_own_and_nothing_else(tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    write_demo_model(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="name an empty or new folder"):
        write_demo_model(tmp_path)


def test_other_models_are_left_to_vllm() -> None:
    assert resolve_model("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pdserve").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelUnavailable) as caught:
        resolve_model("demo")
    assert str(caught.value) == (
        f"cannot write {cache_dir()}/demo-model: File exists; set XDG_CACHE_HOME to a folder that "
        "has room and may be written"
    )


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / ".draft-old", tmp_path / ".draft-new"
    for folder in (old, new):
        (folder / "inner").mkdir(parents=True)
    yesterday_s = time.time() - 25 * 3600
    os.utime(old, (yesterday_s, yesterday_s))
    with whole_folder(tmp_path / "model") as draft:
        (draft / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".draft-new", "model"]
