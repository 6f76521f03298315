"""What a run does with every gradient, window and seed, each fact by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

import altprop as ap
from altprop.lab import checkpoint
from altprop.lab.building import build_model, make_optimiser
from altprop.lab.evaluation import Evaluation, evaluate
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from altprop.lm.model import GPT, EquilibriumLM, ModelConfig
from altprop.lm.text import Batches
from lm_runs import small, steps

pytestmark = pytest.mark.usefixtures("no_curves")

CPU = torch.device("cpu")


# Clipping


def gradients(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> list[Tensor]:
    """Train, and return the whole gradient that the optimiser saw at every step, in float64."""
    seen: list[Tensor] = []

    def watched(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimiser = make_optimiser(model, config)

        def look(*_: object) -> None:
            parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            seen.append(torch.cat(parts).double())

        optimiser.register_step_pre_hook(look)
        return optimiser

    with monkeypatch.context() as patch:
        patch.setattr("altprop.lab.train.make_optimiser", watched)
        train(config)
    return seen


@pytest.mark.parametrize(
    "model",
    [{}, {"model": "gpt", "layers": 1}, {"model": "gpt", "rule": ap.FeedbackAlignment()}],
    ids=["equilibrium", "backprop", "FeedbackAlignment"],
)
def test_a_gradient_longer_than_clip_has_length_clip_and_its_direction_and_others_stay(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = gradients(monkeypatch, small(tmp_path / "free", clip=1e9, **model))
    lengths = [float(gradient.norm()) for gradient in free]
    logged = [record["gradient_norm"] for record in steps(tmp_path / "free")]
    assert logged == pytest.approx(lengths, rel=1e-5)  # nothing was clipped, and this is the norm

    clip = sorted(lengths)[4]
    clipped = gradients(monkeypatch, small(tmp_path / "clipped", clip=clip, **model))
    before = [record["gradient_norm"] for record in steps(tmp_path / "clipped")]
    assert min(before) < clip < max(before)  # both kinds occur
    for norm, gradient in zip(before, clipped, strict=True):
        assert float(gradient.norm()) == pytest.approx(min(norm, clip), rel=1e-5)

    short = gradients(monkeypatch, small(tmp_path / "short", clip=lengths[0] / 3, steps=1, **model))
    torch.testing.assert_close(short[0], free[0] / 3, rtol=1e-4, atol=1e-9)


# Evaluation


def test_evaluation_windows_are_the_same_for_every_seed_and_training_batches_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[Tensor] = []
    trained: list[Tensor] = []
    draw = Batches.draw

    def look(model: Any, held_out: tuple[Tensor, Tensor], *rest: Any) -> Evaluation:
        evaluated.append(torch.stack(held_out))
        return evaluate(model, held_out, *rest)

    monkeypatch.setattr("altprop.lab.train.evaluate", look)
    for seed in (0, 1, 2):
        torch.manual_seed(seed)  # nor does what was drawn before matter
        config = small(tmp_path / str(seed), seed=seed, steps=2, eval_every=1, eval_windows=5)
        with monkeypatch.context() as patch:

            def drawn(self: Batches) -> tuple[Tensor, Tensor]:
                batch = draw(self)
                trained.append(batch[0])
                return batch

            patch.setattr(Batches, "draw", drawn)
            train(config)
    ways, ends = ([w for w in evaluated if (w.shape[1] == 5) is way] for way in (True, False))
    assert len(ways) == 6 and len(ends) == 3 and ways[0].shape == (2, 5, 16)
    assert all(torch.equal(w, same[0]) for same in (ways, ends) for w in same)
    assert len({tuple(batch.flatten().tolist()) for batch in trained}) == 6


def models() -> list[Any]:
    torch.manual_seed(0)
    shape = ModelConfig(13, 8, 8, 2, layers=1)
    made: list[Any] = [GPT(shape), EquilibriumLM(shape, ap.Anderson(tol=1e-7))]
    for model in made:
        torch.nn.init.normal_(model.head.weight)  # so that windows differ much
    return [model.double().eval() for model in made]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("count", [1, 5, 6])
def test_the_evaluation_is_the_mean_over_windows_also_with_a_shorter_last_batch(
    model: Any, count: int
) -> None:
    torch.manual_seed(1)
    ids, targets = torch.randint(13, (2, count, 8))
    with torch.no_grad():
        alone = [
            float(nnf.cross_entropy(model(x[None])[0][0], y))
            for x, y in zip(ids, targets, strict=True)
        ]
    expected = sum(alone) / count
    for batch in (1, 2, 4, 100):
        loss = evaluate(model, (ids, targets), batch, CPU).loss
        assert loss == pytest.approx(expected, rel=1e-6)
    if count == 5:  # batches of 4 and 1: their mean is another number
        of_batches = (sum(alone[:4]) / 4 + alone[4]) / 2
        assert abs(of_batches - expected) > 1e-2


# The seed of a rule


RULES = [
    ap.FeedbackAlignment(),
    ap.FeedbackAlignment(init="orthogonal"),
    ap.KolenPollack(),
    ap.WeightMirror(),
    ap.AlignedFeedback(),
    ap.DirectFeedback(),
    ap.DirectFeedback(granularity="block"),
    ap.BlockDirectFeedback(),
    ap.GrAPE(calibrate_every=3),
]


def feedback(rule: ap.AbstractRule, seed: int, drawn_before: int) -> dict[str, Tensor]:
    """Return the tensors that a rule adds to a GPT of a run with that seed."""
    config = TrainConfig(
        model="gpt", rule=rule, seed=seed, layers=2, d_model=16, heads=2, context=16
    )
    torch.manual_seed(drawn_before)
    model = build_model(config, 21)
    plain = set(GPT(config.shape(21)).state_dict())
    return {k: v for k, v in model.state_dict().items() if k not in plain and v.dim() > 1}


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_seed_of_a_run_draws_the_feedback_of_its_gpt_and_nothing_else_does(
    rule: ap.AbstractRule,
) -> None:
    first, again, other = feedback(rule, 3, 0), feedback(rule, 3, 1), feedback(rule, 4, 0)
    assert first and first.keys() == again.keys() == other.keys()
    assert [k for k in first if not torch.equal(first[k], again[k])] == []
    assert [k for k in first if torch.equal(first[k], other[k])] == []


def test_two_runs_differ_in_the_feedback_by_their_seeds_alone(tmp_path: Path) -> None:
    kept = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small(
            tmp_path / name, model="gpt", layers=1, rule=ap.DirectFeedback(), seed=seed, steps=1
        )
        train(config)
        state = checkpoint.load(tmp_path / name / "last.safetensors").model
        plain = set(GPT(config.shape(21)).state_dict())
        kept[name] = [v for k, v in sorted(state.items()) if k not in plain and v.dim() > 1]
    assert kept["a"]
    assert all(torch.equal(x, y) for x, y in zip(kept["a"], kept["b"], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(kept["a"], kept["c"], strict=True))
