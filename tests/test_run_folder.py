"""A run is the folder that its config.yaml lies in: copied, moved, linked, seen from anywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from altprop import CheckpointError, ConfigError, FeedbackAlignment
from altprop.lab.cli import main
from altprop.lab.config import read_config
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from altprop.lab.values import fit
from lm_runs import SMALL, assert_equal_bits, curve, reconfigure, sentences, steps, tensors, tree

pytestmark = pytest.mark.usefixtures("no_curves")


def run(out: str | None, **changes: Any) -> TrainConfig:
    """Return a run of two steps of which no figure depends on how many are still to come."""
    options = {"data": "text.txt", "steps": 2, "eval_every": 2, "warmup": 1, "final_lr": 1.0}
    folder = None if out is None else Path(out)
    return TrainConfig(**{**SMALL, **options, "out": folder, **changes})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder: a text, and two runs on it, one of which made two steps more."""
    here = tmp_path_factory.mktemp("template")
    (here / "text.txt").write_text(sentences(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name, count in (("a", 2), ("longer", 4)):
            train(run(f"runs/{name}", steps=count))
    return here


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, a copy, so that nothing in it is where it was when the run began."""
    folder = shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


def go_on(config: Path | str, *more: str) -> int:
    return main(["train", "--config", str(config), "--resume", "--steps", "4", *more])


# Which folder


def copied(here: Path) -> Path:
    return shutil.copytree("runs/a", Path("runs/copy")) / "config.yaml"


def copied_far_away(here: Path) -> Path:
    return shutil.copytree("runs/a", Path("else/where/deep")) / "config.yaml"


def linked_hard(here: Path) -> Path:
    return shutil.copytree("runs/a", Path("runs/copy"), copy_function=os.link) / "config.yaml"


def linked_file_by_file(here: Path) -> Path:
    Path("runs/copy").mkdir()
    for path in Path("runs/a").resolve().iterdir():
        Path("runs/copy", path.name).symlink_to(path)
    return Path("runs/copy/config.yaml")


def without_its_vocabulary(here: Path) -> Path:
    file = copied(here)
    (file.parent / "vocab.json").unlink()
    return file


COPIES = [copied, copied_far_away, linked_hard, linked_file_by_file, without_its_vocabulary]


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_a_copied_run_goes_on_in_the_copy_and_the_original_stays(
    copy: Callable[[Path], Path], here: Path
) -> None:
    file = copy(here)
    before = tree(here / "runs" / "a")
    assert go_on(file) == 0
    assert tree(here / "runs" / "a") == before
    assert curve(file.parent) == curve(here / "runs" / "longer")
    assert_equal_bits(tensors(file.parent), tensors(here / "runs" / "longer"))
    assert read_config(file, TrainConfig).out == file.parent


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_a_copied_run_that_is_overwritten_is_the_copy(
    copy: Callable[[Path], Path], here: Path
) -> None:
    file = copy(here)
    Path("other.txt").write_text("0123456789\n" * 100, encoding="utf-8")
    before = tree(here / "runs" / "a")
    assert main(["train", "--config", str(file), "--overwrite", "--data", "other.txt"]) == 0
    assert tree(here / "runs" / "a") == before
    assert read_config(file, TrainConfig).data == str(here / "other.txt")
    assert len(steps(file.parent)) == 2


@pytest.mark.parametrize("name", ["vocab.json", "metrics.jsonl", "curves.png", "best.safetensors"])
@pytest.mark.parametrize("way", ["--resume", "--overwrite"])
def test_what_is_no_file_is_refused_before_anything_changes(
    name: str, way: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here / "runs" / "a" / name
    path.unlink(missing_ok=True)
    path.mkdir()
    before = tree(here)
    assert main(["train", "--config", "runs/a/config.yaml", way, "--steps", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is no file" in line and tree(here) == before


def test_a_moved_run_goes_on_where_it_is(here: Path) -> None:
    Path("runs/a").rename("renamed")
    assert go_on("renamed/config.yaml") == 0
    assert sorted(os.listdir("runs")) == ["longer"]
    assert curve(Path("renamed")) == curve(Path("runs/longer"))


def test_a_run_goes_on_from_any_working_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    Path("text.txt").write_text("another text of that name. " * 200, encoding="utf-8")
    assert go_on("../runs/a/config.yaml") == 0
    assert curve(here / "runs" / "a") == curve(here / "runs" / "longer")
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize("link", ["folder", "file"])
def test_a_link_to_a_run_is_that_run(link: str, here: Path) -> None:
    if link == "folder":
        Path("latest").symlink_to("runs/a")
    else:
        Path("latest.yaml").symlink_to("runs/a/config.yaml")
    assert go_on("latest/config.yaml" if link == "folder" else "latest.yaml") == 0
    assert curve(Path("runs/a")) == curve(Path("runs/longer"))
    assert Path("runs/a/config.yaml").is_file() and not Path("runs/a").is_symlink()


EDITS: dict[str, Callable[[list[str]], list[str]]] = {
    "cut off": lambda lines: lines[: len(lines) // 2],
    "with a folder": lambda lines: ["out: runs/a\n", *lines],
    "with other steps": lambda lines: [line.replace("steps: 2", "steps: 9") for line in lines],
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_config_that_was_cut_off_or_edited_leads_nowhere(
    edit: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would read as another configuration, the default's where lines are missing."""
    file = copied(here)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(EDITS[edit](lines)), encoding="utf-8")
    before = tree(here)
    assert go_on(file) == 2
    said = capsys.readouterr().err
    assert "cut off, edited" in said or "out is not read from a file: write --out" in said
    assert main(["sample", str(file.parent)]) == 2
    assert tree(here) == before
    train(run("runs/copy", steps=4, resume=True))  # the checkpoint knows what it was
    assert curve(here / "runs" / "copy") == curve(here / "runs" / "longer")
    assert read_config(file, TrainConfig).steps == 4


def test_a_folder_in_words_wins_over_the_one_of_the_file(here: Path) -> None:
    before = tree(here / "runs" / "longer")
    copied(here)
    assert go_on("runs/longer/config.yaml", "--out", "runs/copy") == 0
    assert tree(here / "runs" / "longer") == before
    assert curve(Path("runs/copy")) == curve(Path("runs/longer"))


# A new run from the config of another


def test_the_config_of_a_run_starts_no_other_in_its_folder_without_a_word(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    assert main(["train", "--config", "runs/a/config.yaml", "--seed", "3"]) == 2
    said = capsys.readouterr().err
    assert "runs/a already holds a run: add --resume to go on with it, --overwrite" in said
    assert "name another folder with --out" in said
    assert tree(here) == before
    assert main(["train", "--config", "runs/a/config.yaml", "--seed", "3", "--out", "b"]) == 0
    assert read_config(Path("b/config.yaml"), TrainConfig).seed == 3


def test_a_config_copied_out_of_a_run_starts_a_new_one_below_runs(here: Path) -> None:
    shutil.copy("runs/a/config.yaml", "mine.yaml")
    before = set(os.listdir("runs"))
    assert main(["train", "--config", "mine.yaml"]) == 0
    (new,) = set(os.listdir("runs")) - before
    assert curve(Path("runs", new)) == curve(Path("runs/a"))


def test_a_file_of_that_name_that_is_no_run_s_is_read_as_it_stands(here: Path) -> None:
    Path("config.yaml").write_text("steps: 7\n", encoding="utf-8")
    read = read_config(Path("config.yaml"), TrainConfig)
    assert (read.out, read.steps) == (None, 7)


@pytest.mark.parametrize("line", ["out: runs/b", "resume: true", "overwrite: true"])
def test_where_to_and_whether_to_go_on_is_not_read_from_a_file(line: str, here: Path) -> None:
    Path("mine.yaml").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"mine.yaml: {line.partition(':')[0]} is not read from"):
        read_config(Path("mine.yaml"), TrainConfig)


def test_two_runs_of_one_second_get_two_folders(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20300101-120000")
    rule = {"model": "gpt", "layers": 1}
    configs = [
        run(None, steps=1, **changes)
        for changes in ({}, {}, rule, {**rule, "rule": FeedbackAlignment()})
    ]
    assert [train(config).folder.name for config in configs] == [
        "text-AEP-20300101-120000",
        "text-AEP-20300101-120000-2",
        "text-backprop-20300101-120000",
        "text-FeedbackAlignment-20300101-120000",
    ]


@pytest.mark.parametrize("name", ["resume", "overwrite"])
def test_what_needs_a_folder_is_refused_without_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs the run's folder: write --out FOLDER"):
        TrainConfig(**{name: True})


def test_a_home_folder_is_found_behind_the_tilde(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(here))
    Path("mine.yaml").write_text("steps: 7\n", encoding="utf-8")
    assert main(["train", "--config=~/mine.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == 7
    assert fit(Path, "~/runs/new", "out") == here / "runs" / "new"


@pytest.mark.parametrize("line", ["out: /elsewhere", "resume: true", "overwrite: true"])
def test_a_file_does_not_say_where_a_run_writes(
    line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(f"{line}\n", encoding="utf-8")
    assert main(["train", "--config=mine.yaml"]) == 2
    assert "is not read from a file: write --" in capsys.readouterr().err
    Path("mine.yaml").write_text("out: null\nresume: false\n", encoding="utf-8")
    assert main(["train", "--config=mine.yaml", "--print_config"]) == 0


# The text, and how far


def test_a_run_of_a_version_without_an_option_says_so_and_stays(here: Path) -> None:
    reconfigure(Path("runs/a"), without="clip")
    before = tree(here)
    with pytest.raises(CheckpointError, match="runs/a was started by a version .* without clip: "):
        train(run("runs/a", steps=4, resume=True))
    assert tree(here) == before
    reconfigure(Path("runs/a"), without="quiet")  # which makes no other run
    train(run("runs/a", steps=4, resume=True))


def test_the_same_text_may_lie_elsewhere_and_another_is_refused(here: Path, template: Path) -> None:
    stored = read_config(Path("runs/a/config.yaml"), TrainConfig)
    assert stored.data == str(template / "text.txt")  # to be found from any working folder
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("moved.txt").write_text(text, encoding="utf-8")
    Path("other.txt").write_text(text.replace("king", "gnik"), encoding="utf-8")
    before = tree(here)
    with pytest.raises(CheckpointError, match="other values of data: write --config runs/a"):
        train(run("runs/a", data="other.txt", steps=4, resume=True))
    assert tree(here) == before
    train(run("runs/a", data="moved.txt", steps=4, resume=True))
    assert curve(Path("runs/a")) == curve(Path("runs/longer"))
    assert read_config(Path("runs/a/config.yaml"), TrainConfig).data == str(here / "moved.txt")


def test_resume_refuses_a_text_that_changed_within_its_characters(here: Path) -> None:
    train(run("runs/b"))
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("text.txt").write_text(text.replace("king", "gnik"), encoding="utf-8")
    before = tree(here)
    with pytest.raises(CheckpointError, match="runs/b was started with another text than text.txt"):
        train(run("runs/b", steps=4, resume=True))
    assert tree(here) == before


def test_resume_refuses_to_end_before_the_steps_that_were_made(here: Path) -> None:
    before = tree(here)
    with pytest.raises(CheckpointError, match="has made 2 steps, more than 1: write --steps 2"):
        train(run("runs/a", data="text.txt", steps=1, resume=True))
    assert tree(here) == before


@pytest.mark.parametrize("model", ["gpt", "equilibrium"])
def test_a_run_keeps_no_option_of_another_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config reads back, whatever other models' defaults will be."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(sentences(), encoding="utf-8")
    config = run("run", model=model)
    train(config)
    kept = yaml.safe_load(Path("run/config.yaml").read_text(encoding="utf-8"))
    own = {"gpt": "rule", "equilibrium": "solver"}
    assert {name for name in own.values() if name in kept} == {own[model]}
    assert read_config(Path("run/config.yaml"), TrainConfig).model == model
