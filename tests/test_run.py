"""A run's folder goes on where it was stopped, bit for bit, and is never mixed with another."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from altprop import AEP, Anderson, CheckpointError, Implicit
from altprop.lab import checkpoint
from altprop.lab.cli import main
from altprop.lab.config import read_config
from altprop.lab.evaluation import Evaluation
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from altprop.lm.text import CharTokenizer
from lm_runs import (
    assert_equal_bits,
    curve,
    sentences,
    small,
    steps,
    tensors,
    tree,
    when_logged,
    words,
)

pytestmark = pytest.mark.usefixtures("no_curves", "as_in_a_terminal")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def crash() -> None:
    raise ZeroDivisionError("a crash")


# Stop and go on


@pytest.mark.parametrize(
    "changes",
    [{}, {"block": "damped", "estimator": Implicit(), "stabiliser": None}],
    ids=["gated AEP with the hinge", "damped Implicit without"],
)
def test_a_run_interrupted_and_resumed_equals_one_that_was_not(
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(small(tmp_path / "whole", **changes))
    config = small(tmp_path / "cut", **changes)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        when_logged(patch, 5, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.load(tmp_path / "cut" / "last.safetensors").notes["progress"]["step"] == 5
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")[:6]  # with the evaluation at 4
    said = capsys.readouterr().out
    assert "stopped after step 5 of 8" in said
    command = shlex.split(said.splitlines()[-1])
    assert command[:2] == ["altprop", "train"]

    assert main(command[1:]) == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert_equal_bits(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert_equal_bits(tensors(tmp_path / "cut", "best"), tensors(tmp_path / "whole", "best"))


def test_the_printed_command_goes_on_also_in_a_folder_with_spaces_and_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my first 'run' [a] :b:"
    with monkeypatch.context() as patch:
        when_logged(patch, 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(small(folder))
    assert main(shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]) == 0
    assert len(steps(folder)) == 8


OWN = """
from dataclasses import dataclass
from altprop import AbstractSolver, Anderson

@dataclass(frozen=True)
class OwnSolver(AbstractSolver):
    tol: float = 1e-3
    max_steps: int = 20
    def solve(self, *args, **kwargs):
        return Anderson(tol=self.tol, max_steps=self.max_steps).solve(*args, **kwargs)
"""


def test_the_printed_command_imports_what_the_run_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_parts.py").write_text(OWN)
    config = small(tmp_path / "run", block="damped", stabiliser=None)
    own = ["--import", "own_parts", "--estimator", "AEP(solver=OwnSolver())", "--solver"]
    with monkeypatch.context() as patch:
        when_logged(patch, 2, interrupt)
        argv = ["train", *words(config, "block"), "--stabiliser", "null", *own, "Anderson"]
        assert main(argv) == 130
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:4] == ["altprop", "train", "--import", "own_parts"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(steps(tmp_path / "run")) == 8


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def twice() -> None:
        interrupt()
        interrupt()

    with monkeypatch.context() as patch:
        when_logged(patch, 6, twice)
        with pytest.raises(KeyboardInterrupt):
            train(small(folder))
    assert checkpoint.load(folder / "last.safetensors").notes["progress"]["step"] == 4
    train(small(tmp_path / "whole"))
    train(small(folder, resume=True))
    assert curve(folder) == curve(tmp_path / "whole")


def test_an_interrupted_process_exits_with_130_and_its_run_goes_on(tmp_path: Path) -> None:
    constant = {"final_lr": 1.0, "eval_every": 10**6}  # nothing in it depends on how many steps
    config = small(tmp_path / "cut", steps=10**6, **constant)
    process = subprocess.Popen(
        [sys.executable, "-m", "altprop", "train", *words(config, "final_lr")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "cut" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        assert time.monotonic() < end, "no step within a minute"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "altprop: interrupted\n"
    made = checkpoint.load(tmp_path / "cut" / "last.safetensors").notes["progress"]["step"]
    assert made == len(steps(tmp_path / "cut")) >= 3
    assert f"stopped after step {made} of 1000000" in out

    command = shlex.split(out.splitlines()[-1])[1:]
    assert main([*command, "--steps", str(made + 2)]) == 0
    train(small(tmp_path / "whole", steps=made + 2, **constant))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_resume_after_a_crash_drops_the_metrics_past_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "crashed"
    with monkeypatch.context() as patch:
        when_logged(patch, 7, crash)
        with pytest.raises(ZeroDivisionError):
            train(small(folder))
    assert steps(folder)[-1]["step"] == 7
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')  # the power went
    train(small(tmp_path / "whole"))
    train(small(folder, resume=True))
    assert curve(folder) == curve(tmp_path / "whole")


def test_a_resumed_run_may_be_longer_and_remembers_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(small(folder))
    train(small(folder, resume=True, steps=10))
    assert [record["step"] for record in steps(folder)] == list(range(1, 11))
    assert read_config(folder / "config.yaml", TrainConfig) == small(folder, steps=10)


def test_resume_refuses_other_values_and_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small(folder))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="other values of estimator, batch, lr: write"):
        train(small(folder, resume=True, lr=1e-4, batch=2, estimator=AEP(tol=1e-4)))
    assert tree(tmp_path) == before


def test_resume_refuses_a_text_whose_characters_changed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = small(folder)
    train(config)
    Path(config.data).write_text(sentences().replace("k", "Q"), encoding="utf-8")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        train(replace(config, resume=True))
    assert tree(tmp_path) == before


def test_resume_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume: leave out --resume"):
        train(small(tmp_path / "nothing", resume=True))
    assert not (tmp_path / "nothing").exists()
    folder = tmp_path / "run"
    train(small(folder))
    (folder / "last.previous.safetensors").unlink()
    (folder / "best.safetensors").replace(folder / "last.safetensors")
    with pytest.raises(CheckpointError, match="without the optimiser's state"):
        train(small(folder, resume=True))
    (folder / "last.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint yet .* --overwrite"):
        train(small(folder, resume=True))


# The folder


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small(folder))
    (folder / "notes.txt").write_text("mine")
    train(small(tmp_path / "fresh", seed=1))
    train(small(folder, seed=1, overwrite=True))
    assert curve(folder) == curve(tmp_path / "fresh")
    assert_equal_bits(tensors(folder, "best"), tensors(tmp_path / "fresh", "best"))
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_config(folder / "config.yaml", TrainConfig) == small(folder, seed=1)


def test_a_run_that_is_there_is_refused_unless_it_is_to_be_resumed_or_replaced(
    tmp_path: Path,
) -> None:
    train(small(tmp_path / "run"))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run: add --resume .* --overwrite"):
        train(small(tmp_path / "run", seed=1))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "metrics.jsonl", "last.safetensors"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_untouched(
    name: str, overwrite: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("important: true\n")
    config = small(tmp_path / "mine", overwrite=overwrite)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="is no run folder"):
        train(config)
    assert tree(tmp_path) == before


def test_a_run_without_a_folder_gets_a_new_one_named_after_text_and_estimator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(replace(small(tmp_path / "x", steps=1), out=None))
    assert result.folder.parent == Path("runs")
    assert result.folder.name.startswith("text-AEP-")
    stored = read_config(result.folder / "config.yaml", TrainConfig)
    assert stored == small(result.folder, steps=1, data=str(tmp_path / "text.txt"))


def test_a_finished_run_holds_its_configuration_vocabulary_metrics_and_checkpoints(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    config = small(folder, steps=6, solver=Anderson(tol=1e-4), sample=30)
    result = train(config)
    assert set(os.listdir(folder)) == {
        ".lock",
        "run.json",
        "last.previous.safetensors",
        "config.yaml",
        "vocab.json",
        "metrics.jsonl",
        "best.safetensors",
        "last.safetensors",
    }  # and curves.png, in tests/test_report.py
    assert read_config(folder / "config.yaml", TrainConfig) == config
    tokenizer = CharTokenizer.from_json(folder / "vocab.json")
    assert tokenizer == CharTokenizer.from_text(sentences())
    assert len(result.sample) == 30 and set(result.sample) <= set(tokenizer.vocab)
    evaluated = [r for r in curve(folder) if "validation_loss" in r]
    assert [r["step"] for r in evaluated] == [4, 6]  # every 4 steps and at the end
    assert result.loss == evaluated[-1]["validation_loss"]
    assert result.best_loss == min(r["validation_loss"] for r in evaluated)
    for record in steps(folder):
        assert {"lr", "gradient_norm", "free_residual", "adjoint_residual"} <= record.keys()
        assert record["free_residual"] <= config.free_limit


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([2.0, 1.0, 3.0, 1.5, 1.75])
    monkeypatch.setattr("altprop.lab.train.evaluate", lambda *_: Evaluation(next(given), 0.0, True))
    result = train(small(tmp_path / "run", eval_every=2))
    assert (result.loss, result.best_loss, result.final_loss) == (1.5, 1.0, 1.75)
    notes = [
        checkpoint.load(tmp_path / "run" / f"{name}.safetensors").notes["progress"]["step"]
        for name in ("best", "last")
    ]
    assert notes == [4, 8]
