"""A comparison from end to end: the same start for all, controls, what goes wrong, resumption."""

from __future__ import annotations

import csv
import inspect
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

import altprop as ap
from altprop.errors import AltpropError
from altprop.lab.cli import main
from altprop.lab.compare import Comparison, compare
from altprop.lab.compare.arms import Arm, CalibrationAlone, arms_of
from altprop.lab.compare.trial import group_of
from altprop.lab.display import Trials
from altprop.lab.report_command import report
from altprop.lab.tasks import Parity
from altprop.lab.tasks.supervised import Supervised
from lm_runs import tree
from made_comparisons import compare_quickly

TASK = Parity(bits=4, k=1, examples=64, width=6)
SMALL: dict[str, Any] = {"seeds": 2, "steps": 6, "rates": (3e-3,), "budget": 1}
FA, DFA = ap.FeedbackAlignment(std=0.3), ap.DirectFeedback("block", std=0.3, calibrate_every=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare_quickly(monkeypatch, tmp_path)


def small(out: str = "out", **changes: Any) -> Comparison:
    given = {"task": TASK, "rules": (FA,), "out": Path(out), **SMALL, **changes}
    return compare(given.pop("task"), **given)


def metrics(folder: str, arm: str) -> list[dict[str, Any]]:
    (file,) = Path(folder).glob(f"trials/{arm}/final-*-seed0/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(results: Any) -> Any:
    """Return results but for what is measured of the machine."""
    arms = [{k: v for k, v in arm.items() if k not in ("cost", "equal_cost")}
            for arm in results["arms"]]  # fmt: skip
    return {**results, "arms": arms}


def test_every_arm_starts_from_the_same_weights_on_the_same_batch() -> None:
    small(rules={"FA": FA, "DFA": DFA}, equal_cost=False)
    first = [metrics("out", arm)[0]["loss"] for arm in ("backprop", "frozen", "FA", "DFA")]
    assert len(set(first)) == 1
    second = [metrics("out", arm)[1]["loss"] for arm in ("backprop", "frozen", "FA", "DFA")]
    assert len(set(second)) == 4  # and the rules are not backprop


def test_results_hold_what_a_reader_needs() -> None:
    found = small(rules={"FA": FA})
    results = json.loads(Path("out/results.json").read_text())
    assert results == json.loads(json.dumps(found.results))
    assert results["finished"] and results["task"]["data"] == TASK.source
    assert [arm["name"] for arm in results["arms"]] == ["backprop", "frozen", "FA"]
    arm = found.arm("FA")
    assert arm["mean"] == pytest.approx(sum(arm["scores"]) / 2) and len(arm["interval"]) == 2
    assert arm["difference"]["mean"] == pytest.approx(arm["mean"] - found.arm("backprop")["mean"])
    assert [c["steps"][-1] for c in arm["curves"]] == [6, 6]
    assert [c["score"][-1] for c in arm["curves"]] == arm["scores"]
    groups = arm["audit"][0]["groups"]
    assert [g["name"] for g in groups] == ["blocks.0", "blocks.1", "head"]
    assert groups[-1]["cosine"] == pytest.approx(1) and abs(groups[0]["cosine"]) < 0.999
    numbers = sum(p.numel() for n, p in TASK.model(0).named_parameters() if "weight" in n)
    assert arm["cost"]["carried_numbers"] == numbers
    assert arm["cost"]["peak_bytes"] > 0 and arm["cost"]["relative"] > 0
    how = {r["parameter"]: r["how"] for r in found.arm("backprop")["read"]}
    assert how["blocks.1.0.weight"].startswith("carried as a matrix")
    how = {r["parameter"]: r["how"] for r in arm["read"]}
    assert how["blocks.1.0.weight"] == "not read"
    assert "FA" in str(found) and "frozen" in str(found)


def test_frozen_moves_the_head_alone_and_calibration_the_hidden_layers_now_and_then() -> None:
    task = Parity(bits=4, k=1, examples=64, width=6)
    frozen, calibrated = Arm("frozen", frozen=True), Arm("c", CalibrationAlone(DFA))
    models = [task.model(0), task.model(0)]
    frozen.apply(task, models[0], 0)
    learning = [name for name, p in models[0].named_parameters() if p.requires_grad]
    assert learning == ["head.weight", "head.bias"]
    calibrated.apply(task, models[1], 0)
    weight = models[1].get_parameter("blocks.0.0.weight")
    reached = []
    for _ in range(6):
        models[1].zero_grad(set_to_none=True)
        task.loss(models[1], task.batches(0).draw()).backward()
        assert models[1].get_parameter("head.weight").grad is not None
        reached.append(weight.grad is not None)
    assert sum(reached) == 2 and reached[:3] == reached[3:]


def test_an_estimator_is_an_arm_and_an_exact_one_learns_as_backprop_does() -> None:
    found = small(rules={"AEP": ap.AEP()}, controls=("backprop",), equal_cost=False)
    assert found.arm("AEP")["scores"] == found.arm("backprop")["scores"]
    assert found.arm("AEP")["cost"]["evaluations"] > 0
    assert found.arm("AEP")["recovery"] is None  # there is no frozen arm


def test_a_rule_that_does_not_fit_is_said_in_its_arm_and_the_others_run() -> None:
    found = small(rules={"micro": ap.DirectFeedback("sublayer"), "FA": FA}, equal_cost=False)
    assert "no sublayer taps" in found.arm("micro")["refused"]
    assert found.arm("micro")["scores"] == [None, None] and found.arm("FA")["mean"] is not None
    assert found.results["finished"]


def test_a_run_that_diverges_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TASK.recipe, refused_in_a_row=2)
    monkeypatch.setattr(Parity, "recipe", property(lambda self: recipe))
    found = small(rules={"FA": FA}, rates=(1e30,), steps=30, equal_cost=False)
    assert found.arm("FA")["difference"] is None
    assert found.results["finished"]
    assert found.arm("backprop")["failed"].startswith("seed 0: diverged")
    assert found.arm("backprop")["mean"] is None


def test_a_comparison_goes_on_where_it_was_cut_off_and_ends_the_same() -> None:
    whole = without_times(small().results)
    before = tree(Path("out"))
    for file in Path("out").glob("trials/*/final-*-seed1/done.json"):
        file.unlink()  # cut off while it trained
    assert without_times(small(resume=True).results) == whole
    again = tree(Path("out"))
    same = [name for name in before if name.endswith("seed0/done.json")]
    assert same and all(before[name] == again[name] for name in same)


ODD_OUTCOMES: dict[str, dict[str, Any]] = {
    "score is 'x', expected a number or null": {"score": "x"},
    "lr is a list, expected a number": {"lr": [1]},
    "score is nan, expected a number or null": {"score": math.nan},
    "cost.relative is not that of any step": {
        "cost": {
            "relative": 0.0,
            "seconds_per_step": 1.0,
            "quartiles": [1.0, 1.0],
            "peak_bytes": 1,
            "carried_numbers": 0,
            "parameters": 1,
        }
    },
}


@pytest.mark.parametrize("told", ODD_OUTCOMES)
def test_a_damaged_outcome_is_refused_before_anything_is_written(told: str) -> None:
    small(seeds=1, equal_cost=False)
    path = next(Path("out").glob("trials/*/final-*/done.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **ODD_OUTCOMES[told]}))
    before = tree(Path("out"))
    with pytest.raises(ap.CheckpointError, match=f"no outcome of a trial .{told}.: remove it"):
        small(seeds=1, equal_cost=False, resume=True)
    assert tree(Path("out")) == before


def test_results_that_are_no_file_are_refused_before_anything_is_written() -> None:
    small(seeds=1, equal_cost=False)
    Path("out/results.json").unlink()
    Path("out/results.json").mkdir()
    before = tree(Path("out"))
    with pytest.raises(ap.CheckpointError, match="results.json is no file: remove it"):
        small(seeds=1, equal_cost=False, resume=True)
    assert tree(Path("out")) == before


def test_a_resumed_comparison_may_have_more_rules_and_seeds_but_no_other_steps() -> None:
    small(equal_cost=False)
    more = small(rules=(FA, ap.SignSymmetry()), seeds=3, resume=True, equal_cost=False)
    assert len(more.arm("SignSymmetry()")["scores"]) == 3
    with pytest.raises(ap.CheckpointError, match="started with other values of steps"):
        small(steps=7, resume=True)


def test_side_by_side_in_processes_the_results_are_the_same() -> None:
    alone = small(controls=("backprop",), equal_cost=False)
    beside = small("other", controls=("backprop",), equal_cost=False, workers=2)
    assert without_times(alone.results) == without_times(beside.results)


def test_the_folder_s_command_and_options_compute_the_same_again() -> None:
    first = small(equal_cost=False)
    words = json.loads(Path("out/record.json").read_text())
    assert words["versions"].keys() == {"altprop", "torch", "python"}
    assert main([*shlex.split(words["command"])[1:], "--out", "again"]) == 0
    assert main(["compare", "--config", "out/comparison.yaml", "--out", "third"]) == 0
    for folder in ("again", "third"):
        results = json.loads(Path(folder, "results.json").read_text())
        assert without_times(results) == without_times(json.loads(json.dumps(first.results)))


@dataclass(frozen=True)
class Shrunk(ap.AbstractTransport):
    """A rule of one's own."""

    def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
        return W * 0.5


def test_the_command_names_the_module_of_a_rule_of_one_s_own() -> None:
    small(rules=(Shrunk(),), controls=("backprop",), equal_cost=False)
    command = json.loads(Path("out/record.json").read_text())["command"]
    assert command.split()[:2] == ["altprop", "compare"]
    words = [sys.executable, "-m", *shlex.split(command), "--out", "again"]
    elsewhere = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(words, check=True, env=elsewhere)
    first, again = (json.loads(Path(f, "results.json").read_text()) for f in ("out", "again"))
    assert without_times(first) == without_times(again)


def test_anybody_s_model_and_data_are_a_task() -> None:
    x = torch.randn(90, 3)
    y = (x[:, :1] > 0).long().squeeze(1)
    task = Supervised(
        "own", lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (x, y), (x, y)
    )
    found = small(task=task, rules={"FA": FA}, rates=(1e-2,))
    assert found.arm("FA")["mean"] is not None and found.results["task"]["name"] == "own"
    assert yaml.safe_load(Path("out/comparison.yaml").read_text())["task"] == "own"
    assert found.arm("frozen")["cost"]["parameters"] == 12  # the last map alone


def test_an_arm_that_is_not_there_is_answered_with_those_that_are() -> None:
    found = Comparison(Path("out"), {"arms": [{"name": "backprop"}, {"name": "FA"}]})
    with pytest.raises(ap.ConfigError, match="unknown arm 'fa': did you mean FA"):
        found.arm("fa")


def test_a_group_is_a_layer() -> None:
    names = ["blocks.1.attn.q.weight", "head.weight", "2.bias", "system.dynamics.A"]
    assert [group_of(name) for name in names] == ["blocks.1", "head", "2", "system"]


def test_one_calibration_stands_beside_all_rules_that_calibrate_alike() -> None:
    rules = (DFA, ap.GrAPE(calibrate_every=3), ap.GrAPE(calibrate_every=5), FA)
    names = [arm.name for arm in arms_of(rules, ("calibration",)) if arm.control]
    assert names == ["calibration alone, every 3", "calibration alone, every 5"]
    assert not any(arm.control for arm in arms_of(rules, ()))


def test_folders_of_arms_differ_where_their_names_do() -> None:
    names = ["a", "a b", "a-b", "a/b", "A" * 90, "A" * 91, ".."]
    folders = [Arm(name).folder for name in names]
    assert len(set(folders)) == len(names) and not any("/" in f or ".." in f for f in folders)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "TASK: unknown class 'nothing'"),
        (["parity", "--rules", "Nope"], "unknown class 'Nope'"),
        (["parity", "--seeds", "0"], "seeds is 0, expected at least 1"),
        (["parity", "--rates", "0.1,-1"], "expected numbers > 0"),
        (["parity", "--rates", "0.1"], "rates is 0.1 alone: give two or more"),
        (["parity", "--budget", "2"], "budget is 2 for 3 rates"),
        (["parity", "--controls", "bp"], "unknown control 'bp'"),
        (["parity", "--controls", "[]"], "there is nothing to compare"),
        (["parity", "--rules", "SignSymmetry,SignSymmetry"], "several arms are called"),
        (["parity", "--workers", "0"], "workers is 0"),
        (["parity", "--resume"], "resume needs the comparison's folder"),
        (["parity", "--resume", "--out", "a"], "a holds no comparison to resume"),
        (["parity", "--out", "mine"], "mine is no comparison folder"),
        (["parity", "--rules", "DirectFeedback('sublayer')"], "no sublayer taps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine").mkdir()
    Path("mine/text").write_text("mine")
    before = tree(Path("."))
    assert main(["compare", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("altprop: error: ") and said.count("\n") == 1 and told in said
    assert tree(Path(".")) == before


OPTIONS: dict[str, Any] = {
    "task": Parity(bits=4, k=1, examples=64, width=5),
    "rules": (ap.SignSymmetry(),),
    "seeds": 3,
    "seed": 1,
    "steps": 7,
    "rates": (1e-2,),
    "budget": 2,
    "search_steps": 0,
    "controls": ("frozen",),
    "equal_cost": True,
    "workers": 0,
    "out": Path("elsewhere"),
    "resume": True,
    "overwrite": True,
}


def test_every_option_changes_what_comes_out_or_is_refused() -> None:
    assert OPTIONS.keys() == inspect.signature(compare).parameters.keys()
    plain = {"equal_cost": False, "controls": (), "seeds": 1}

    def call(**options: Any) -> Any:
        for folder in ("out", "elsewhere"):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            found = small(**{**plain, **options})
        except AltpropError as error:
            return str(error)
        keys = [arm["equal_cost"] is None for arm in found.results["arms"]]
        return without_times(json.loads(json.dumps(found.results))), found.folder, keys

    before = call()
    assert before == call()
    same = [name for name, value in OPTIONS.items() if call(**{name: value}) == before]
    assert same == ["overwrite"]  # where there is nothing to replace
    shutil.rmtree("out")
    small(**plain)
    with pytest.raises(ap.CheckpointError, match="already holds a comparison"):
        small(**plain)
    assert small(**plain, steps=7, overwrite=True).results["steps"] == 7


def test_names_and_errors_of_a_comparison_reach_a_terminal_as_text() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    hostile = {"refused": None, "failed": "\x1b[31mred", "mean": None, "name": "[bold]a\x07"}
    task = {"name": "own", "score": "accuracy", "unit": "%"}
    console.print(
        Comparison(Path("c"), {"task": task, "steps": 1, "seeds": [0], "arms": [hostile]}).table()
    )
    with Trials(1, console=console) as shown:
        shown.trial("\x1b]0;title\x07", {"refused": None, "failed": "\x1b[2J", "score": None})
    said = out.getvalue()
    assert r"[bold]a\x07" in said and r"\x1b[31mred" in said and r"\x1b]0;title\x07" in said
    assert not any(obeyed in said for obeyed in ("\x1b[31m", "\x1b[2J\n", "\x1b]0;", "\x07"))


def test_a_page_shows_what_a_comparison_wrote(tmp_path: Path) -> None:
    found = small(rules={"FA": FA, "micro": ap.DirectFeedback("sublayer")})
    page = report(Path("out"), png=tmp_path / "c.png", csv=tmp_path / "c.csv").read_text()
    assert "no sublayer taps" in page and "altprop compare" in page and TASK.source in page
    with (tmp_path / "c.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "FA" and row["step"] == "6"]
    assert [float(row["score"]) for row in rows] == found.arm("FA")["scores"]
