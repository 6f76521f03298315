"""`--ema`: averaged weights are judged, kept and sampled; the weights that learn are untouched."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import altprop as ap
from altprop.lab import checkpoint
from altprop.lab.building import averaged, build_model
from altprop.lab.cli import main
from altprop.lab.evaluation import evaluate
from altprop.lab.guard import Guard
from altprop.lab.sample_command import load_run
from altprop.lab.train import train
from altprop.lm.text import load_corpus, windows
from lm_runs import assert_equal_bits, curve, small, steps, tensors, when_logged

pytestmark = pytest.mark.usefixtures("no_curves", "as_in_a_terminal")

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "equilibrium": {},
    "thick": {"block": "thick", "solver": ap.Anderson()},
    "tied": {"model": "gpt", "layers": 1, "tie_head": True},
    "learned feedback": {"model": "gpt", "layers": 1, "rule": ap.KolenPollack()},
    "broadcast": {"model": "gpt", "layers": 1, "rule": ap.GrAPE(calibrate_every=4)},
    "frozen": {"model": "gpt", "layers": 1, "freeze": ("blocks.*",)},
}
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def trajectory(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Return the list that will hold the weights which each update of the average is given."""
    seen: list[dict[str, torch.Tensor]] = []
    update = AveragedModel.update_parameters

    def look(self: AveragedModel, model: torch.nn.Module) -> None:
        seen.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
        update(self, model)

    monkeypatch.setattr(AveragedModel, "update_parameters", look)
    return seen


@every_model
def test_what_is_kept_and_judged_is_the_exponential_mean_over_the_steps(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = trajectory(monkeypatch)
    config = small(tmp_path / "run", ema=0.75, lr=1e-2, **changes)
    result = train(config)
    assert len(seen) == 8
    weights = [0.75**7, *(0.25 * 0.75 ** (7 - n) for n in range(1, 8))]
    assert sum(weights) == pytest.approx(1)
    saved = checkpoint.load(tmp_path / "run" / "last.safetensors")
    for name in seen[0]:
        mean = sum(w * step[name] for w, step in zip(weights, seen, strict=True))
        torch.testing.assert_close(saved.model[name].double(), mean, rtol=1e-5, atol=1e-7)
        assert torch.equal(saved.training[name].double(), seen[-1][name])
    assert not torch.equal(saved.model["head.weight"], saved.training["head.weight"])

    corpus = load_corpus(config.data)
    held_out = windows(corpus.validation, config.eval_windows, config.context, seed=0)
    for which, loss in (("last", result.loss), ("best", result.best_loss)):
        model, _ = load_run(tmp_path / "run", which, "cpu")  # type: ignore[arg-type]
        assert evaluate(model, held_out, config.batch, CPU).loss == loss


@every_model
def test_an_average_beside_it_changes_nothing_of_the_training(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    train(small(tmp_path / "without", **changes))
    train(small(tmp_path / "with", ema=0.9, **changes))
    assert steps(tmp_path / "with") == steps(tmp_path / "without")
    without, having = (tensors(tmp_path / name) for name in ("without", "with"))
    assert not any(name.startswith("training.") for name in without)
    trained = {k: v for k, v in having.items() if k.startswith("training.")}
    own = {f"training.{k[6:]}": v for k, v in without.items() if k.startswith("model.")}
    assert_equal_bits(trained, own)


@pytest.mark.parametrize("name", ["equilibrium", "tied", "learned feedback", "broadcast"])
def test_a_resumed_run_with_an_average_equals_one_that_was_not_interrupted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**MODELS[name], "ema": 0.8}
    train(small(tmp_path / "whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        when_logged(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        train(small(tmp_path / "cut", **changes))
    train(small(tmp_path / "cut", resume=True, **changes))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    for which in ("last", "best"):
        assert_equal_bits(tensors(tmp_path / "cut", which), tensors(tmp_path / "whole", which))


def test_refused_steps_leave_the_average_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what the stabiliser does on them nor the time that passes moves it."""
    check = Guard.check

    def spoiled(
        self: Guard, model: Any, optimiser: Any, loss: float, progress: Any, passes: Any
    ) -> Any:
        measured = check(self, model, optimiser, loss, progress, passes)
        if progress.step + 1 in (3, 4):
            self._refuse("told to", optimiser, progress)
        return measured

    monkeypatch.setattr(Guard, "check", spoiled)
    seen = trajectory(monkeypatch)
    assert train(small(tmp_path / "run", ema=0.5)).refused == 2
    assert len(seen) == 6
    saved = tensors(tmp_path / "run")
    assert int(saved["extra.averaged"]) == 6
    weights = [0.5**5, *(0.5 ** (6 - n) for n in range(1, 6))]
    mean = sum(w * s["head.weight"] for w, s in zip(weights, seen, strict=True))
    torch.testing.assert_close(saved["model.head.weight"].double(), mean, rtol=1e-5, atol=1e-7)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(ids, ids)[1].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_model
def test_the_average_is_a_whole_model_of_its_own_with_its_rules_and_ties(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = small(tmp_path / "run", ema=0.9, seed=3, **changes)
    torch.manual_seed(0)
    model = build_model(config, 21)
    gradients(model, torch.randint(21, (2, 16)))  # as a rehearsal does: there is a certificate
    average = averaged(model, config)
    assert average is not None
    copy: Any = average.module
    assert [n for n, _ in copy.named_parameters()] == [n for n, _ in model.named_parameters()]
    held = {p.data_ptr() for p in model.parameters()}
    assert not held & {p.data_ptr() for p in copy.parameters()}
    assert (copy.head.weight is copy.tokens.weight) is config.tie_head
    ids = torch.randint(21, (2, 16))
    assert_equal_bits(gradients(copy, ids), gradients(model, ids))
    if config.rule is not None:
        with ap.rules_off(copy):
            exact = gradients(copy, ids)
        plain = build_model(small(tmp_path / "run", model="gpt", layers=1), 21)
        plain.load_state_dict({n: copy.state_dict()[n] for n in plain.state_dict()})
        for name, value in gradients(plain, ids).items():
            torch.testing.assert_close(exact[name], value)
        ruled = gradients(copy, ids)  # the rule is on again, in the copy too
        assert any(not torch.allclose(exact[n], ruled[n], rtol=1e-2) for n in exact)
    with torch.no_grad():
        model.head.weight += 1.0
    assert not torch.equal(model.head.weight, copy.head.weight)
    with torch.no_grad():
        before = [b.certificate for _, b in ap.equilibria(model)]
        copy(ids, ids)
        assert [b.certificate for _, b in ap.equilibria(model)] == before


def test_an_average_needs_a_decay_below_one_and_is_no_other_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(tmp_path / "run", model="gpt", layers=1))
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["train", "--config", config, "--resume", "--ema", "0.9"]) == 2
    assert "other values of ema" in capsys.readouterr().err
    assert main(["train", "--ema", "1"]) == 2
    assert "ema is 1.0, expected in [0, 1)" in capsys.readouterr().err
