"""What is written is whole or as before, and does not reach through links into another file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from altprop import CheckpointError
from altprop.files import replacing, write_whole
from altprop.lab import checkpoint
from altprop.lab.config import write_config
from altprop.lab.reporting.picture import plot_run
from altprop.lab.settings import TrainConfig
from altprop.lm.text import CharTokenizer
from lm_runs import tree

WRITERS: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": lambda path: write_whole(path, '{"step": 1}\n'),
    "config.yaml": lambda path: write_config(path, TrainConfig()),
    "vocab.json": lambda path: CharTokenizer.from_text("abc").to_json(path),
    "last.safetensors": lambda path: checkpoint.save(path, torch.nn.Linear(2, 3), None, {}, {}),
    "curves.png": lambda path: plot_run(path.parent),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return tmp_path / "run"


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_at_the_end_changes_nothing(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "metrics.jsonl":
        (folder / name).write_text("before")
    before = tree(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        WRITERS[name](folder / name)
    assert tree(folder) == before


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard", "symbolic"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_linked_file_is_replaced_and_what_it_was_linked_to_stays(
    name: str, link: Callable[[Path, Path], None], folder: Path, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    original.write_text('{"step": 1, "loss": 2.0}\n')
    (folder / name).unlink(missing_ok=True)
    link(original, folder / name)
    WRITERS[name](folder / name)
    assert original.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert (folder / name).read_bytes() != original.read_bytes()
    assert not (folder / name).is_symlink()


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_has_the_mode_of_the_umask(name: str, folder: Path) -> None:
    before = os.umask(0o027)
    try:
        WRITERS[name](folder / name)
    finally:
        os.umask(before)
    assert (folder / name).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_too(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace = os.replace

    def renamed(source: Path, target: Path) -> None:
        done.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr("altprop.files.os.replace", renamed)
    monkeypatch.setattr(
        "os.fsync", lambda opened: done.append(os.readlink(f"/proc/self/fd/{opened}"))
    )
    WRITERS[name](folder / name)
    assert done[-3:] == [str(folder / f".{name}.part"), f"rename {name}", str(folder)]


def test_what_a_crash_left_is_replaced_and_a_link_there_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".file.part").symlink_to("mine")
    write_whole(tmp_path / "file", "new")
    assert tree(tmp_path) == {"file": b"new", "mine": b"mine"}


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(path) as fresh:
        fresh.write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == {"file": b"before"}
