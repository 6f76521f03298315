"""What a sweep is asked for and the folder that it goes on in: mistakes, damages, refusals."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import altprop as ap
import fuzz
from altprop import CheckpointError, ConfigError
from altprop.lab.cli import main
from altprop.lab.sweep import sweep
from altprop.lab.sweep.spec import read_spec
from altprop.lm.blocks import STABILISER
from lm_runs import SMALL, tree

pytestmark = pytest.mark.usefixtures("no_curves")

optuna = pytest.importorskip("optuna")
from sweeps import RATES, begin_in, closed_form, off, spec, study  # noqa: E402


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return begin_in(tmp_path, monkeypatch)


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
    assert config.stabiliser == replace(STABILISER, target=0.25)
    assert (config.estimator, config.layers) == (ap.Implicit(tol=0.01), None)
    assert (config.ema, config.d_model) == (0.5, SMALL["d_model"])
    assert {name for corner in asked.corners() for name in corner} == searched.keys()


WRONG: list[tuple[Mapping[str, Any], str]] = [
    ({"lrr": [1]}, "sweep.lrr: unknown option lrr: did you mean lr?"),
    ({"lr": 3}, "sweep.lr: expected a list of choices, or a range such as {low: 1e-4, high"),
    ({"lr": []}, "sweep.lr: expected a list of choices"),
    ({"lr": {"low": 1}}, "sweep.lr: expected a list of choices, or a range"),
    ({"lr": {"low": 1, "high": 2, "step": 1}}, "sweep.lr: expected a list of choices, or a range"),
    ({"lr": {"low": 2, "high": 1}}, "sweep.lr: low is 2 and high is 1, expected finite numbers"),
    ({"lr": {"low": 1, "high": math.inf}}, "sweep.lr: low is 1 and high is inf, expected finite"),
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
            for line in statement.split("; "):
                base.execute(line)

    return damage


def overwritten(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[200:9000] = bytes(8800)
    path.write_bytes(raw)


TABLES = [f"trial_{kind}" for kind in ("params", "values", "intermediate_values", "heartbeats")]
TABLES += ["trial_user_attributes", "trial_system_attributes", "trials"]
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
    "options of what was begun": (
        damaged("UPDATE trials SET state = 'RUNNING'; DELETE FROM trial_params"),
        "trial 0: it has the options of none",
    ),
    "the last trial": (damaged("DELETE FROM trials WHERE number = 1"), "missing|not there"),
    "every trial": (
        damaged("; ".join(f"DELETE FROM {t}" for t in TABLES)),
        "trial 0 is missing",
    ),
    "ranges": (damaged(ATTRIBUTE.format("ranges", "7")), "ranges is 7, expected a mapping"),
    "a range": (damaged(ATTRIBUTE.format("ranges", '{"lr": [0.5, 0.6]}')), "lr is not searched fr"),
    "of no trial": (
        damaged(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (9, 'x', '1')"
        ),
        "trial_user_attributes holds a row of what is not there",
    ),
    "ends": (damaged(ATTRIBUTE.format("closed", '[["x", 1, ""]]')), "an end of what is no range"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_study_is_refused_in_a_line_and_nothing_is_written(
    damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = closed_form(monkeypatch, off)
    words = ["sweep", str(spec({"lr": RATES})), "--widen", "0", "--out", "s"]
    assert main([*words, "--trials", "2"]) == 0
    for number in range(2):  # as their runs do
        Path(f"s/trials/{number:04}").mkdir(exist_ok=True)
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
        ({"out": Path("a\udcff")}, "out is .*, which is not UTF-8: name another folder"),
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
