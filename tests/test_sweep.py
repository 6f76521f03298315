"""A sweep finds the least of what it searches, calls no edge a best, and goes on where it was."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shlex
import sqlite3
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import altprop as ap
import fuzz
from altprop import CheckpointError, ConfigError, ConvergenceError
from altprop.lab.callbacks import Callback
from altprop.lab.cli import main
from altprop.lab.config import read_config
from altprop.lab.edges import beyond, open_ends, short
from altprop.lab.reporting import picture
from altprop.lab.reporting.metrics import read_metrics
from altprop.lab.settings import TrainConfig
from altprop.lab.sweep import sweep
from altprop.lab.sweep.spec import read_spec
from altprop.lab.train import TrainResult
from lm_runs import SMALL, sentences, tree

pytestmark = pytest.mark.usefixtures("no_curves")

optuna = pytest.importorskip("optuna")

BASE: dict[str, Any] = {**SMALL, "data": "text.txt", "model": "gpt", "layers": 1}
RATES = {"low": 1e-4, "high": 1e-3, "log": True}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which holds a text. No sweep is drawn: that would take the longest."""
    monkeypatch.setattr("altprop.lab.sweep.command.plot_sweep", lambda *_: _[-1])
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(sentences(), encoding="utf-8")
    return tmp_path


def spec(searched: Mapping[str, Any], name: str = "spec.yaml", **base: Any) -> Path:
    Path(name).write_text(yaml.safe_dump({**BASE, **base, "sweep": dict(searched)}))
    return Path(name)


def closed_form(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[[TrainConfig], float]
) -> list[TrainConfig]:
    """Let runs end at a loss that is known, falling towards it; return them as they are made."""
    made: list[TrainConfig] = []

    def train(config: TrainConfig, callbacks: Sequence[Callback]) -> TrainResult:
        made.append(config)
        least = loss(config)
        for step in (1, 2, 3):
            record = {"step": step, "validation_loss": least + 1 / step, "validation_settled": True}
            for callback in callbacks:
                callback.on_evaluation(record)
        return TrainResult(config.out or Path(), least, least, least, True, 0, "")

    monkeypatch.setattr("altprop.lab.sweep.workers.train", train)
    return made


def study(folder: str = "s") -> Any:
    """Open a sweep's file as anybody may."""
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db")


def kept(folder: str) -> list[Any]:
    """Return what is kept of every trial, without the times."""
    return [(t.number, t.state, t.params, t.value, t.intermediate_values)
            for t in study(folder).trials]  # fmt: skip


def off(config: TrainConfig) -> float:
    """A loss whose least is at a rate of 1e-2."""
    return math.log10(config.lr / 1e-2) ** 2


# Edges


def test_an_end_is_open_where_nothing_was_tried_far_enough_beyond() -> None:
    assert open_ends(3.0, [1.0, 3.0, 10.0], log=True) == ()
    assert open_ends(1.0, [1.0, 3.0, 10.0], log=True) == (-1,)
    assert open_ends(10.0, [1.0, 3.0, 10.0], log=False) == (1,)
    assert open_ends(3.0, [3.0], log=True) == (-1, 1)
    assert open_ends(3.0, [1.0, 3.0, 3.1], log=True, apart=0.1) == (1,)
    assert open_ends(3.0, [1.0, 3.0, 3.1], log=False, apart=0.1) == ()
    assert beyond(1e-3, math.log(10), log=True) == pytest.approx(1e-2, rel=1e-12)
    assert beyond(3.0, -1.0, log=False) == 2.0
    assert [short(1234.567, o) for o in (500, 50, 1, 0)] == [1000.0, 1200.0, 1235.0, 1234.567]


def test_a_range_is_widened_until_the_loss_rises_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = closed_form(monkeypatch, off)
    found = sweep(spec({"lr": RATES}), trials=5, widen=9, out=Path("s"), prune=False)
    rates = [config.lr for config in made]
    assert all(1e-4 <= rate <= 1e-3 for rate in rates[:5]) and max(rates) > 1e-2
    assert found.best is not None and found.edges == () and len(made) <= 5 + 9
    best = float(found.best["lr"])
    assert off(replace(made[0], lr=best)) == found.loss == min(map(off, made))
    assert min(rates) < best < max(rates)
    quarter = 10**0.25  # of the range, by which each look beyond is away
    assert 1e-2 / quarter < best < 1e-2 * quarter


def test_a_best_at_the_edge_is_called_none_and_the_sweep_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = closed_form(monkeypatch, off)
    words = ["sweep", str(spec({"lr": RATES})), "--trials", "4", "--out", "s", "--prune", "false"]
    assert main([*words, "--widen", "1"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert len(made) == 5 and said.startswith("no best yet: the lowest loss, ")
    assert f"the edge of what was tried (lr {made[-1].lr!r}): go on with --resume" in said
    assert main([*words, "--widen", "9", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "altprop train --data text.txt" in said.splitlines()[-1] and "\nbest: " in said
    assert len({config.lr for config in made}) == len(made)  # nothing was made twice


def test_the_end_of_what_an_option_takes_is_no_edge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = closed_form(monkeypatch, lambda config: config.dropout)
    found = sweep(spec({"dropout": {"low": 0.0, "high": 0.5}}), trials=4, out=Path("s"))
    assert found.best is not None and found.loss == min(config.dropout for config in made)
    assert found.loss is not None and found.loss < 0.125  # from where a look beyond is below 0
    assert "dropout is searched to its start: dropout is -" in capsys.readouterr().out


def test_a_range_of_whole_numbers_is_widened_by_whole_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = closed_form(monkeypatch, lambda config: abs(config.batch - 7))
    searched = {"batch": {"low": 1, "high": 3}}
    found = sweep(spec(searched), trials=2, widen=9, out=Path("s"), prune=False)
    assert found.best is not None and (found.best["batch"], found.loss) == ("7", 0)
    assert all(type(config.batch) is int for config in made)
    assert max(config.batch for config in made) == 8


# Trials


def test_a_trial_that_falls_behind_is_pruned_and_only_such_a_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed_form(monkeypatch, off)
    wide = {"lr": {"low": 1e-4, "high": 1.0, "log": True}}
    sweep(spec(wide), trials=14, widen=0, out=Path("s"))
    sweep(spec(wide), trials=14, widen=0, out=Path("all"), prune=False)
    state = optuna.trial.TrialState
    assert {t.state for t in study("all").trials} == {state.COMPLETE}
    trials = study().trials
    pruned = [t for t in trials if t.state == state.PRUNED]
    assert pruned
    for t in pruned:
        step, loss = max(t.intermediate_values.items())
        others = [o.intermediate_values[step] for o in trials[: t.number]
                  if o.state == state.COMPLETE]  # fmt: skip
        assert loss > statistics.median(others)


def test_a_failed_trial_is_kept_with_its_reason_and_the_sweep_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverges(config: TrainConfig) -> float:
        if config.lr > 1e-2:
            raise ConvergenceError("lost\nits fixed point")
        return -config.lr

    made = closed_form(monkeypatch, diverges)
    found = sweep(spec({"lr": RATES}), trials=3, widen=9, out=Path("s"))
    assert found.loss is not None and -1e-2 <= found.loss < -1e-3  # what diverges is beyond it
    assert found.best is not None and max(config.lr for config in made) > 1e-2
    assert "failed: lost its fixed point\n" in capsys.readouterr().out
    closed_form(monkeypatch, lambda config: math.nan)
    found = sweep(spec({"lr": RATES}), trials=2, out=Path("none"))
    assert (found.best, found.loss, found.command) == (None, None, "")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("no best: no trial came to a figure: its figure at the end is not fin")


SEARCHED = {"lr": {"low": 3e-3, "high": 3e-2, "log": True}, "rule": [None, "SignSymmetry"]}


def test_an_interrupted_sweep_goes_on_to_what_it_would_have_found_and_so_does_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = sweep(spec(SEARCHED), trials=4, widen=0, out=Path("whole"))
    from altprop.lab.sweep.workers import Reporter

    report, calls = Reporter.on_evaluation, itertools.count()

    def interrupted(self: Reporter, record: Mapping[str, Any]) -> None:
        report(self, record)
        if next(calls) == 4:  # in the third trial, at the first of its two evaluations
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reporter, "on_evaluation", interrupted)
        sweep(spec(SEARCHED), trials=4, widen=0, out=Path("cut"))
    assert len(study("cut").trials) == 3
    for changed in ({"lr": RATES}, {**SEARCHED, "rule": [None]}):
        with pytest.raises(CheckpointError, match="cut was started with other values of sweep"):
            sweep(spec(changed, "other.yaml"), out=Path("cut"), resume=True)
    found = sweep(spec(SEARCHED), trials=4, widen=0, out=Path("cut"), resume=True)
    assert kept("cut") == kept("whole") and found.loss == whole.loss
    sessions = json.loads(Path("cut/trials/0002/run.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 4]

    resumed = sweep(spec(SEARCHED), trials=4, widen=20, out=Path("cut"), resume=True)
    program, *words = shlex.split(resumed.command)
    assert program == "altprop" and main([*words, "--out", "again"]) == 0
    assert read_metrics(Path("again"))[-1]["final_validation_loss"] == resumed.loss


def test_processes_share_a_study_and_make_each_trial_once(here: Path) -> None:
    sweep(spec(SEARCHED), trials=5, widen=0, out=Path("s"), workers=2)
    trials = study().trials
    assert [t.number for t in trials] == [0, 1, 2, 3, 4]
    assert all(t.state.is_finished() for t in trials)
    for t in trials:
        config = read_config(Path(f"s/trials/{t.number:04}/config.yaml"), TrainConfig)
        assert config.lr == pytest.approx(t.params["lr"], rel=1e-3)
        assert config.rule == {"null": None, "SignSymmetry": ap.SignSymmetry()}[t.params["rule"]]


def test_the_picture_shows_every_trial_against_each_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[Any] = []
    save = picture._save
    monkeypatch.setattr(picture, "_save", lambda f, path: figures.append(f) or save(f, path))
    trials = [
        ({"lr": 1e-3, "rule": "GrAPE"}, 2.0, "COMPLETE"),
        ({"lr": 1e-2, "rule": "null"}, 1.0, "COMPLETE"),
        ({"lr": 1e-1, "rule": "null"}, 1.5, "PRUNED"),
        ({"lr": 1.0, "rule": "null"}, None, "FAIL"),
        ({"lr": 0.5, "rule": "null"}, math.inf, "PRUNED"),
    ]
    path = picture.plot_sweep(trials, {"lr": True, "rule": False}, Path("sweep.png"))
    assert path.read_bytes().startswith(b"\x89PNG")
    lr, rule = figures[0].axes
    assert (lr.get_xscale(), rule.get_xlabel()) == ("log", "rule")
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lr.lines}
    assert drawn == {"complete": [(1e-3, 2.0), (1e-2, 1.0)], "best": [(1e-2, 1.0)],
                     "pruned": [(1e-1, 1.5)]}  # fmt: skip
    assert list(rule.lines[0].get_xdata(orig=True)) == ["GrAPE", "null"]


# What is asked for


def test_any_option_can_be_searched_and_parts_of_choices_too() -> None:
    searched = {
        "stabiliser.target": {"low": 0.1, "high": 0.5},
        "estimator": ["AEP(tol=0.05)", "Implicit"],
        "estimator.tol": [0.01, 0.2],
        "layers": [1, None],
        "ema": {"low": 0.5, "high": 0.9},
    }
    asked = read_spec(spec(searched, model="equilibrium"))
    words = {"stabiliser.target": "0.25", "estimator": "Implicit", "estimator.tol": "0.01",
             "layers": "null", "ema": "0.5"}  # fmt: skip
    config = asked.config(words)
    assert config.stabiliser == ap.JacobianHinge(target=0.25)
    assert (config.estimator, config.layers) == (ap.Implicit(tol=0.01), None)
    assert (config.ema, config.d_model) == (0.5, SMALL["d_model"])
    assert {name for corner in asked.corners() for name in corner} == searched.keys()


WRONG: list[tuple[Mapping[str, Any], str]] = [
    ({"lrr": [1]}, "sweep.lrr: unknown option lrr: did you mean lr?"),
    ({"lr": 3}, "sweep.lr: expected a list of choices, or a range such as {low: 1e-4, high"),
    ({"lr": []}, "sweep.lr: expected a list of choices"),
    ({"lr": {"low": 1}}, "sweep.lr: expected a list of choices, or a range"),
    ({"lr": {"low": 1, "high": 2, "step": 1}}, "sweep.lr: expected a list of choices, or a range"),
    ({"lr": {"low": 2, "high": 1}}, "sweep.lr: low is 2 and high is 1, expected low < high"),
    ({"lr": {"low": 0, "high": 1, "log": True}}, "sweep.lr: low is 0, expected a number > 0 where"),
    ({"lr": {"low": "a", "high": 1}}, "sweep.lr: low: expected a number, got 'a'"),
    ({"lr": {"low": 1, "high": 2, "log": "so"}}, "sweep.lr: log: expected true or false, got 'so'"),
    ({"lr": {"low": -1, "high": 2}}, "sweep: lr is -1.0, expected a number > 0"),
    ({"batch": {"low": 1.5, "high": 2}}, "sweep: batch: expected a whole number, got '1.5'"),
    ({"rule": ["SignSymetry"]}, "sweep: rule: unknown class 'SignSymetry': did you mean SignSy"),
    ({"block": ["gated", "damped"]}, "sweep: model gpt has no block: leave that out"),
    ({"rule": ["GrAPE", "GrAPE"]}, "sweep.rule: a choice stands twice in ['GrAPE', 'GrAPE']"),
    ({"stabiliser.goal": [1]}, "sweep: unknown option stabiliser.goal of JacobianHinge"),
    ({7: [1]}, "sweep: 7 is no option: write its name as text"),  # type: ignore[dict-item]
    ({"out": ["a"]}, "sweep.out: not an option to search: leave it out"),
    ({"seed": [1, 2]}, "sweep.seed: not an option to search: leave it out"),
]


@pytest.mark.parametrize(
    ("searched", "told"), WRONG, ids=lambda v: "-".join(map(str, v)) if v else None
)
def test_a_mistake_in_a_spec_is_told_in_one_line_before_anything_is_written(
    searched: Mapping[str, Any], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spec(searched)
    before = tree(here)
    assert main(["sweep", str(path), "--out", "s"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"altprop: error: spec.yaml: {told}")
    assert said.err.count("\n") == 1 and said.out == "" and tree(here) == before


def test_all_mistakes_in_a_spec_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"sweep.heads: expected .*; sweep.lrr: unknown option"):
        sweep(spec({"lrr": [1], "heads": 3}))
    Path("spec.yaml").write_text("steps: 3\n")
    with pytest.raises(ConfigError, match="there is no mapping 'sweep' of options to search"):
        sweep(Path("spec.yaml"))
    with pytest.raises(ConfigError, match="out is not read from a file: write --out instead"):
        sweep(spec({"lr": RATES}, out="elsewhere"))


def test_a_folder_that_is_not_this_sweeps_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    made = closed_form(monkeypatch, off)
    path = spec({"lr": RATES})
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("all of it")
    with pytest.raises(CheckpointError, match="mine is no sweep folder: name a new folder"):
        sweep(path, out=Path("mine"), overwrite=True)
    with pytest.raises(CheckpointError, match="s holds no sweep to resume: leave out --resume"):
        sweep(path, out=Path("s"), resume=True)
    sweep(path, out=Path("s"), trials=2, widen=0)
    with pytest.raises(CheckpointError, match="s already holds a sweep: add --resume"):
        sweep(path, out=Path("s"))
    sweep(path, out=Path("s"), trials=1, widen=0, overwrite=True)
    assert len(study().trials) == 1 and len(made) == 3


def damaged(statement: str) -> Callable[[Path], None]:
    """Return what changes a study by a statement of SQL."""

    def damage(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as base, base:
            base.execute("PRAGMA foreign_keys = OFF")
            base.execute(statement)

    return damage


def overwritten(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[200:9000] = bytes(8800)
    path.write_bytes(raw)


ATTRIBUTE = "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (1, '{}', '{}')"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no database": (lambda path: path.write_bytes(b"a" * 9000) and None, "not a database"),
    "pages": (overwritten, "malformed|not the study"),
    "a folder": (lambda path: path.unlink() or path.mkdir(), "study.db is no file: remove it"),
    "a fifo": (lambda path: path.unlink() or os.mkfifo(path), "study.db is no file: remove it"),
    "a version": (damaged("UPDATE alembic_version SET version_num = 'x'"), "no longer compatible"),
    "another study": (damaged("UPDATE studies SET study_name = 'x'"), "holds the studies x"),
    "no study": (damaged("DELETE FROM studies"), "not the study of this sweep"),
    "direction": (damaged("UPDATE study_directions SET direction = 'MAXIMIZE'"), "lowest loss"),
    "a state": (damaged("UPDATE trials SET state = 'x'"), "not the study of this sweep"),
    "no options": (damaged("DELETE FROM trial_params"), "trial 0: it has the options of none"),
    "no values": (damaged("DROP TABLE trial_values"), "trial 0: its loss is .*expected a list"),
    "a value": (damaged("UPDATE trial_params SET param_value = -1"), "trial 0: lr is -1.0, which"),
    "a trial": (damaged("UPDATE trials SET number = 5 WHERE number = 0"), "trial 0 is missing"),
    "ranges": (damaged(ATTRIBUTE.format("ranges", "7")), "ranges is 7, expected a mapping"),
    "a range": (damaged(ATTRIBUTE.format("ranges", '{"lr": [0.5, 0.6]}')), "lr is not searched fr"),
    "ends": (damaged(ATTRIBUTE.format("closed", '[["x", 1, ""]]')), "an end of what is no range"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_study_is_refused_in_a_line_and_nothing_is_written(
    damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = closed_form(monkeypatch, off)
    words = ["sweep", str(spec({"lr": RATES})), "--widen", "0", "--out", "s"]
    assert main([*words, "--trials", "2"]) == 0
    harm, told = DAMAGES[damage]
    harm(Path("s/study.db"))
    before = fuzz.tree(Path("s"))
    capsys.readouterr()
    assert main([*words, "--trials", "3", "--resume"]) == 2
    said = capsys.readouterr()
    assert re.search(told, said.err) and said.err.count("\n") == 1 and said.out.count("\n") < 2
    assert fuzz.tree(Path("s")) == before and len(made) == 2


def test_a_sweep_that_was_cut_off_before_it_had_a_study_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = closed_form(monkeypatch, off)
    sweep(spec({"lr": RATES}), trials=1, widen=0, out=Path("s"))
    Path("s/study.db").write_bytes(b"")
    sweep(spec({"lr": RATES}), trials=2, widen=0, out=Path("s"), resume=True)
    assert len(study().trials) == 2 and len(made) == 3


def test_a_lock_that_is_a_fifo_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = closed_form(monkeypatch, off)
    sweep(spec({"lr": RATES}), trials=1, widen=0, out=Path("s"))
    Path("s/.lock").unlink()
    os.mkfifo("s/.lock")
    sweep(spec({"lr": RATES}), trials=2, widen=0, out=Path("s"), resume=True)
    assert len(made) == 2


def test_overwriting_what_cannot_be_replaced_leaves_the_sweep(
    monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    closed_form(monkeypatch, off)
    sweep(spec({"lr": RATES}), trials=1, widen=0, out=Path("s"))
    Path("s/study.db").unlink()
    Path("s/study.db").mkdir()
    before = tree(here)
    with pytest.raises(CheckpointError, match="study.db is no file: remove it"):
        sweep(spec({"lr": RATES}), out=Path("s"), overwrite=True)
    assert tree(here) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trials": 0}, "trials is 0, expected at least 1"),
        ({"widen": -1}, "widen is -1, expected at least 0"),
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0 to 2\\^32"),
        ({"resume": True}, "resume needs the sweep's folder: write --out FOLDER --resume"),
        ({"resume": True, "overwrite": True, "out": Path("s")}, "exclude each other"),
    ],
)
def test_what_a_sweep_cannot_be_made_with_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sweep(spec({"lr": RATES}), **changes)


def test_optuna_that_is_not_there_is_named_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    path = spec({"lr": RATES})
    before = tree(here)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'need the package optuna: pip install "altprop\[sweep'):
        sweep(path, out=Path("s"))
    assert tree(here) == before
