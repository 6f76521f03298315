"""A sweep finds the least of what it searches, calls no edge a best, and goes on where it was."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import altprop as ap
from altprop import CheckpointError, ConvergenceError
from altprop.lab.cli import main
from altprop.lab.config import read_config
from altprop.lab.edges import beyond, open_ends, short
from altprop.lab.reporting import picture
from altprop.lab.reporting.metrics import read_metrics
from altprop.lab.settings import TrainConfig
from altprop.lab.sweep import sweep

pytestmark = pytest.mark.usefixtures("no_curves")

optuna = pytest.importorskip("optuna")
from sweeps import RATES, begin_in, closed_form, kept, off, spec, study  # noqa: E402


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return begin_in(tmp_path, monkeypatch)


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
