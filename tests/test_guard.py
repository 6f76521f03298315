"""A run that lost its fixed point ends, says so, and can go on; a figure of no state is marked."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from altprop import Anderson, CheckpointError, ConvergenceError, Euler, equilibria
from altprop.lab import checkpoint, gradient
from altprop.lab.cli import main
from altprop.lab.evaluation import Evaluation, count_tiles, evaluate, tiles
from altprop.lab.guard import Guard
from altprop.lab.sample_command import load_run, sample
from altprop.lab.state import Progress
from altprop.lab.train import train
from altprop.lm.model import EquilibriumLM, ModelConfig
from altprop.lm.text import load_corpus
from lm_runs import assert_equal_bits, curve, small, step_of, steps, tensors, when_logged, words

pytestmark = pytest.mark.usefixtures("no_curves", "as_in_a_terminal")

CPU = torch.device("cpu")
GPT: dict[str, Any] = {"model": "gpt", "layers": 1}


def refuse(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Let the loss be not a number at these steps, counted from 1."""
    check = Guard.check

    def spoiled(
        self: Guard, model: Any, optimiser: Any, loss: float, progress: Any, passes: Any
    ) -> Any:
        lost = when(progress.step + 1)
        return check(self, model, optimiser, math.nan if lost else loss, progress, passes)

    monkeypatch.setattr(Guard, "check", spoiled)


# Lost runs


def test_so_many_refused_steps_in_a_row_end_the_run_with_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, lambda step: step == 2 or step >= 6)
    config = small(tmp_path / "run", **GPT, steps=40, eval_every=5, refused_in_a_row=3)
    with pytest.raises(ConvergenceError, match="3 steps in a row were refused, up to step 8 .*nan"):
        train(config)
    assert len(steps(tmp_path / "run")) == step_of(tmp_path / "run") == 8
    assert step_of(tmp_path / "run", "best") == 5  # the weights of a good evaluation are kept


def test_refused_steps_between_others_end_the_run_when_they_are_more_than_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, lambda step: step % 7 == 0)
    config = small(tmp_path / "run", **GPT, steps=90, eval_every=90, refused_in_a_row=3)
    with pytest.raises(
        ConvergenceError, match="4 of the last 30 steps were refused, up to step 28"
    ):
        train(config)
    assert step_of(tmp_path / "run") == 28


def test_a_tenth_of_the_steps_may_be_refused_for_ever_and_the_first_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, lambda step: step % 10 == 1)
    config = small(tmp_path / "run", **GPT, steps=90, eval_every=90, refused_in_a_row=3)
    assert train(config).refused == 9
    saved = checkpoint.load(tmp_path / "run" / "last.safetensors").notes["progress"]
    assert saved["recently"] == [61, 71, 81]  # what no longer counts is not kept
    shorter = replace(config, resume=True, refused_in_a_row=2, steps=92)  # a tenth of 20 steps
    assert train(shorter).refused == 10


def test_by_default_twenty_steps_in_a_row_are_too_many_and_nineteen_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", **GPT, steps=60, eval_every=60)
    with monkeypatch.context() as patch:
        refuse(patch, lambda step: 3 <= step < 22)
        assert train(config).refused == 19
    refuse(monkeypatch, lambda step: 3 <= step < 23)
    with pytest.raises(ConvergenceError, match="20 steps in a row were refused, up to step 22"):
        train(replace(config, overwrite=True))


def test_a_resumed_run_remembers_what_was_refused_and_a_lost_one_is_still_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, lambda step: 4 <= step <= 9)
    changes = {**GPT, "steps": 12, "refused_in_a_row": 4, "final_lr": 1.0}
    with pytest.raises(ConvergenceError):
        train(small(tmp_path / "whole", **changes))
    cut = small(tmp_path / "cut", **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        when_logged(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        train(cut)
    assert step_of(tmp_path / "cut") == 5
    resumed = replace(cut, resume=True)
    for _ in range(2):  # the second finds a run that is lost already, and changes nothing
        with pytest.raises(ConvergenceError, match="4 steps in a row were refused, up to step 7"):
            train(resumed)
        assert step_of(tmp_path / "cut") == 7
        assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
        assert_equal_bits(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert train(replace(resumed, refused_in_a_row=8)).refused == 6
    assert step_of(tmp_path / "cut") == 12


def test_the_command_of_a_lost_run_exits_with_2_and_its_line_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, lambda step: 4 <= step <= 6)
    config = small(tmp_path / "a run", refused_in_a_row=3, stabiliser=None)
    line = [*words(config, "refused_in_a_row"), "--stabiliser", "null"]
    assert main(["train", *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("altprop: error: the run is lost: 3 steps in a row were refused")
    assert "a lower lr, a stabiliser" in error and error.count("\n") == 1
    command = shlex.split(error.partition("all the same: ")[2])
    assert command[:2] == ["altprop", "train"] and main(command[1:]) == 0
    assert step_of(tmp_path / "a run") == 8


@pytest.mark.parametrize("count", [1, 5])
def test_a_run_whose_every_step_was_refused_exits_with_2_however_short(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, lambda step: True)
        assert main(["train", *words(small(tmp_path / "run", steps=count))]) == 2
    error = capsys.readouterr().err
    assert f"every one of its {count} steps was refused (the loss is nan" in error
    assert "a stricter stabiliser" in error and error.count("\n") == 1
    command = shlex.split(error.partition("all the same: ")[2])
    assert main(command[1:]) == 0  # the steps to come are good
    assert step_of(tmp_path / "run") == 2 * count


def test_a_block_that_loses_its_fixed_point_for_want_of_a_stabiliser_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", steps=2000, eval_every=50, lr=0.1, refused_in_a_row=4)
    line = [*words(config, "lr", "refused_in_a_row"), "--block", "thick", "--stabiliser", "null"]
    line += ["--solver", "Anderson"]  # which finds the fixed point of the start
    line += ["--estimator.max_steps", "100"]  # and an adjoint that takes so many
    assert main(["train", *line]) == 2
    assert "the run is lost" in capsys.readouterr().err
    made = steps(tmp_path / "run")
    assert step_of(tmp_path / "run") == len(made) < 400
    assert made[-1]["free_residual"] > config.free_limit
    kept = tensors(tmp_path / "run")
    assert all(bool(torch.isfinite(v).all()) for k, v in kept.items() if k.startswith("model."))


def test_a_gradient_that_amplifies_what_the_free_phase_has_left_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path / "run", steps=3, stabiliser=None)
    model = EquilibriumLM(ModelConfig(vocabulary=5, context=4, d_model=8, heads=2))
    x = torch.randint(5, (2, 5), generator=torch.Generator().manual_seed(0))
    model(x[:, :-1], x[:, 1:])[1].backward()
    ((_, block),) = equilibria(model)
    seen, optimiser = block.certificate, torch.optim.SGD(model.parameters(), lr=0.1)
    assert seen is not None and float(seen.state_error.max()) < config.error_limit
    guard, progress = Guard(config, torch.Generator()), Progress()
    for error, refused in ((0.09, 0), (0.11, 1), (math.nan, 2)):
        seen.state_error = torch.tensor([1e-3, error])
        measured = guard.check(model, optimiser, 1.0, progress, [gradient.made(model)])
        assert progress.refused == refused
        assert measured["state_error"] == pytest.approx(error, nan_ok=True)
    assert all(p.grad is None for p in model.parameters())


# Evaluations at no fixed point


@pytest.mark.parametrize(
    ("solver", "limit", "settled"),
    [
        (Anderson(), 1e-3, True),
        (Anderson(max_steps=1, tol=1e-9), 1e-3, False),
        (Anderson(max_steps=1, tol=1e-9), math.inf, True),
        (Euler(step=0.1, max_steps=2, tol=0), 1e-9, True),  # nobody asked for a residual
    ],
)
def test_an_evaluation_is_settled_if_all_its_states_are_within_the_limit(
    solver: Any, limit: float, settled: bool
) -> None:
    torch.manual_seed(0)
    model = EquilibriumLM(ModelConfig(9, 8, 8, 2, block="damped"), solver, on_failure="accept")
    ids = torch.randint(9, (6, 8))
    seen = evaluate(model, (ids, ids), 4, CPU, limit)
    assert seen.settled is settled
    worst = []
    for window in ids:
        model(window[None], window[None])
        worst += [float(b.certificate.free_residual) for _, b in equilibria(model) if b.certificate]
    assert seen.free_residual == pytest.approx(max(worst), rel=1e-3)


def test_a_state_that_is_not_a_number_is_not_settled_and_shows_in_the_residual() -> None:
    torch.manual_seed(0)
    model = EquilibriumLM(ModelConfig(9, 8, 8, 2), on_failure="accept")
    with torch.no_grad():
        model.tokens.weight[4] = math.nan
    ids = torch.zeros(3, 8, dtype=torch.long)
    ids[1, 2] = 4
    seen = evaluate(model, (ids, ids), 1, CPU, 1e-3)
    assert not seen.settled and not math.isfinite(seen.free_residual)


def test_an_evaluation_at_no_fixed_point_never_becomes_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([(2.0, True), (1.0, False), (1.5, True), (0.5, False), (0.7, False)])

    def judge(*_: Any) -> Evaluation:
        loss, settled = next(given)
        return Evaluation(loss, 0.1, settled)

    monkeypatch.setattr("altprop.lab.train.evaluate", judge)
    result = train(small(tmp_path / "run", **GPT, eval_every=2))
    assert (result.best_loss, result.settled) == (1.5, False)
    assert step_of(tmp_path / "run", "best") == 6


def test_a_run_without_a_settled_evaluation_has_no_best_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Guard, "_settled", lambda *_: True)  # apply them all
    solver = Anderson(max_steps=1, tol=1e-9)
    result = train(small(tmp_path / "run", block="damped", solver=solver, stabiliser=None))
    assert math.isinf(result.best_loss) and math.isfinite(result.loss) and not result.settled
    evaluations = [r for r in curve(result.folder) if "validation_loss" in r]
    assert [r["validation_settled"] for r in evaluations] == [False, False]
    assert curve(result.folder)[-1]["final_validation_settled"] is False
    assert "no best: no evaluation was finite and at a fixed point" in capsys.readouterr().out
    assert not (result.folder / "best.safetensors").exists()
    with pytest.raises(CheckpointError, match="at a fixed point.*write --which last"):
        sample(result.folder)
    load_run(result.folder, "last", "cpu")


# The figure at the end


def test_the_windows_of_the_end_follow_each_other_and_fill_the_text() -> None:
    tokens = np.arange(1000, 1050, dtype=np.uint16)
    x, y = tiles(tokens, 100, 8)
    assert x.shape == (count_tiles(tokens, 8), 8) == (6, 8)
    assert x.flatten().tolist() == list(range(1000, 1048))
    assert torch.equal(y, x + 1)
    assert count_tiles(tokens[:49], 8) == 6 and count_tiles(tokens[:48], 8) == 5


def test_of_many_windows_evenly_spaced_ones_are_taken() -> None:
    tokens = np.arange(8 * 10 + 1, dtype=np.uint16)
    starts = [(tiles(tokens, most, 8)[0][:, 0] // 8).tolist() for most in (1, 3, 5, 10)]
    assert starts == [[0], [0, 3, 6], [0, 2, 4, 6, 8], list(range(10))]


@pytest.mark.parametrize("changes", [{}, GPT], ids=["equilibrium", "gpt"])
def test_the_figure_at_the_end_is_the_mean_over_every_token_of_the_validation_part(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = small(tmp_path / "run", **changes)
    result = train(config)
    model, _ = load_run(tmp_path / "run", "last", "cpu")
    ids = torch.as_tensor(load_corpus(config.data).validation.astype("int64"))
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 16, 16):
            logits, _ = model(ids[None, start : start + 16])
            losses.append(nnf.cross_entropy(logits[0], ids[start + 1 : start + 17]))
    assert result.final_loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    record = curve(tmp_path / "run")[-1]
    assert record["final_validation_loss"] == result.final_loss and result.settled
    assert record["final_windows"] == record["validation_windows"] == len(losses) > 20


def test_a_run_has_one_figure_of_its_end_also_after_it_was_resumed(tmp_path: Path) -> None:
    config = small(tmp_path / "run", **GPT, final_windows=2)
    train(config)
    before = curve(tmp_path / "run")
    train(replace(config, resume=True))  # makes no step
    assert curve(tmp_path / "run") == before
    train(replace(config, resume=True, steps=10))
    ends = [r for r in curve(tmp_path / "run") if "final_validation_loss" in r]
    assert [r["step"] for r in ends] == [10] and ends[0]["final_windows"] == 2
