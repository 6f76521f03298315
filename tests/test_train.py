"""One loop trains by every rule, and never applies what is no gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from altprop import (
    AEP,
    BPTT,
    EP,
    AbstractEstimator,
    AbstractSolver,
    AbstractStabiliser,
    Anderson,
    ConfigError,
    ConvergenceError,
    Euler,
    Implicit,
    JacobianHinge,
    PublishedAEP,
    RuleError,
)
from altprop.lab.building import build_model, make_optimiser
from altprop.lab.settings import TrainConfig
from altprop.lab.train import learning_rate, train
from lm_runs import assert_equal_bits, curve, sentences, small, steps, tensors, tree

pytestmark = pytest.mark.usefixtures("no_curves")

HOPELESS = Anderson(max_steps=1, tol=1e-9)  # on damped attention: far from any equilibrium


# Seeds


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small(tmp_path / name, seed=seed))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert_equal_bits(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    losses = [[record["loss"] for record in steps(tmp_path / name)] for name in "ac"]
    assert all(one != other for one, other in zip(*losses, strict=True))


def test_a_run_leaves_the_global_generator_alone_and_does_not_listen_to_it(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train(small(tmp_path / "a", sample=4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    train(small(tmp_path / "b", sample=4))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


# Learning


def test_training_lowers_the_loss_far_below_that_of_the_letters_frequencies(
    tmp_path: Path,
) -> None:
    text = sentences()
    shares = [text.count(letter) / len(text) for letter in set(text)]
    entropy = -sum(p * math.log(p) for p in shares)
    result = train(small(tmp_path / "run", steps=100, eval_every=50, lr=1e-2))
    losses = [record["loss"] for record in steps(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(len(shares)), abs=0.1)
    assert result.loss < 0.6 * entropy
    assert result.refused == 0


RULES: list[tuple[AbstractEstimator, AbstractSolver]] = [
    (AEP(), Anderson()),
    (EP(), Anderson()),
    (Implicit(), Anderson()),
    (PublishedAEP(), Euler(step=0.2, max_steps=20, tol=0)),
    (BPTT(), Euler(step=0.2, max_steps=20)),
]


@pytest.mark.parametrize("block", ["gated", "damped"])
@pytest.mark.parametrize(
    ("estimator", "solver"), RULES, ids=[type(estimator).__name__ for estimator, _ in RULES]
)
def test_every_block_and_estimator_learns_through_the_same_loop(
    estimator: AbstractEstimator, solver: AbstractSolver, block: str, tmp_path: Path
) -> None:
    config = small(
        tmp_path / "run", block=block, estimator=estimator, solver=solver, lr=1e-2, steps=12
    )
    result = train(config)
    first = steps(tmp_path / "run")[0]["loss"]
    assert result.refused == 0
    assert result.loss < first - 0.3
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        start = build_model(config, 21).state_dict()
    end = tensors(tmp_path / "run")
    assert [k for k, v in start.items() if torch.equal(v, end[f"model.{k}"])] == []


def test_without_a_stabiliser_none_acts_and_with_one_it_does(tmp_path: Path) -> None:
    train(small(tmp_path / "without", stabiliser=None))
    train(small(tmp_path / "with", stabiliser=JacobianHinge(every=2)))
    assert not any("jacobian_gain" in record for record in steps(tmp_path / "without"))
    acted = [record["step"] for record in steps(tmp_path / "with") if "jacobian_gain" in record]
    assert acted == [1, 3, 5, 7]


def test_an_estimator_that_cannot_use_the_solver_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = small(tmp_path / "run", estimator=BPTT(), solver=Anderson())
    before = tree(tmp_path)
    with pytest.raises(RuleError, match="Anderson is none: write .*Euler"):
        train(config)
    assert tree(tmp_path) == before


# Steps that are no gradient


def start_of(config: TrainConfig) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        state = build_model(config, 21).state_dict()
    return {f"model.{name}": value for name, value in state.items()}


def end_of(config: TrainConfig) -> dict[str, torch.Tensor]:
    assert config.out is not None
    return {k: v for k, v in tensors(config.out).items() if k.startswith("model.")}


def test_a_step_that_did_not_converge_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    config = small(tmp_path / "run", block="damped", solver=HOPELESS, stabiliser=None)
    with pytest.raises(ConvergenceError, match="every one of its 8 steps was refused"):
        train(config)
    assert [record["refused"] for record in steps(tmp_path / "run")] == list(range(1, 9))
    assert all(record["free_residual"] > config.free_limit for record in steps(tmp_path / "run"))
    assert_equal_bits(end_of(config), start_of(config))  # neither the loss nor weight decay


def test_on_a_refused_step_the_stabiliser_acts_and_the_loss_does_not(tmp_path: Path) -> None:
    hinge = JacobianHinge(target=1e-3, every=5)
    config = small(tmp_path / "run", block="damped", solver=HOPELESS, stabiliser=hinge, steps=2)
    with pytest.raises(ConvergenceError, match="every one of its 2 steps was refused"):
        train(config)
    assert all("jacobian_gain" in record for record in steps(tmp_path / "run"))  # urgent: no rest
    start, end = start_of(config), end_of(config)
    moved = {name for name, value in start.items() if not torch.equal(value, end[name])}
    block = {name for name in start if name.startswith("model.block.")}
    assert moved and moved <= block  # embeddings, norm and head have only the loss's gradient


@dataclass(frozen=True)
class Overflow(AbstractStabiliser):
    """A stabiliser whose own gradient is infinite."""

    def init(self, generator: torch.Generator) -> Any:
        return JacobianHinge().init(generator)

    def apply(
        self, model: nn.Module, state: Any, step: int, *, urgent: bool = False
    ) -> dict[str, float]:
        for p in model.parameters():
            p.grad = torch.full_like(p, math.inf)
        return {}


@pytest.mark.parametrize("solver", [Anderson(), HOPELESS], ids=["good steps", "refused steps"])
def test_a_stabiliser_that_overflows_is_refused_too_and_counted_once_a_step(
    solver: AbstractSolver, tmp_path: Path
) -> None:
    config = small(tmp_path / "run", block="damped", solver=solver, stabiliser=Overflow(), steps=3)
    with pytest.raises(ConvergenceError, match="every one of its 3 steps was refused"):
        train(config)
    assert steps(tmp_path / "run")[-1]["refused"] == 3
    assert_equal_bits(end_of(config), start_of(config))


def test_a_refused_step_between_others_is_left_out_of_the_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two losses that differ on the refused step alone must train the same model."""
    calls = {"n": 0}

    def spoiled(factor: float) -> Callable[..., Any]:
        def build(config: TrainConfig, vocabulary: int) -> nn.Module:
            model = build_model(config, vocabulary)
            calls["n"] = -1  # the rehearsal

            def spoil(gradient: torch.Tensor) -> torch.Tensor:
                calls["n"] += 1
                return gradient * factor if calls["n"] == 3 else gradient

            weight: Any = model.head.weight
            weight.register_hook(spoil)
            return model

        return build

    for name, factor in (("a", math.inf), ("b", math.nan), ("c", 1.0)):
        monkeypatch.setattr("altprop.lab.building.build_model", spoiled(factor))
        result = train(small(tmp_path / name))
        assert result.refused == (name != "c")
    assert [record["refused"] for record in steps(tmp_path / "a")] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert_equal_bits(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert not torch.equal(
        tensors(tmp_path / "a")["model.head.weight"], tensors(tmp_path / "c")["model.head.weight"]
    )


def test_a_loss_that_is_not_finite_is_refused_and_null_in_the_metrics_of_a_run_that_ends_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", lr=1e30, sample=10)
    result = train(config)
    assert result.refused == 7  # all but the first
    assert math.isnan(result.loss) and result.sample == ""
    assert all(bool(torch.isfinite(value).all()) for value in end_of(config).values())
    said = capsys.readouterr().out
    assert "refused steps 7 of 8" in said and "no sample: the model's logits" in said

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert len(records) == 11  # 8 steps, 2 evaluations and the figure at the end
    assert all(isinstance(record, dict) for record in records)
    assert records[-3]["loss"] is None and records[-2]["validation_loss"] is None
    assert records[-1]["final_validation_loss"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block": "damped", "solver": HOPELESS}, r"step 1: .*free residual .*limit 2e-02"),
        ({"lr": 1e30}, r"step 2: the loss is nan"),
    ],
    ids=["not converged", "not finite"],
)
def test_on_failure_stop_ends_the_run_with_what_was_measured(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConvergenceError, match=said + ".*--on_failure skip"):
        train(small(tmp_path / "run", on_failure="stop", **changes))


# Schedule, optimiser, settings


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine(tmp_path: Path) -> None:
    config = small(tmp_path / "run", lr=0.02, warmup=4, steps=24, final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(25)]
    assert rates[:5] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02])
    assert rates[14] == pytest.approx(0.02 * (1 + 0.1) / 2)  # half way down
    assert rates[24] == pytest.approx(0.002)
    assert rates[9] == pytest.approx(0.002 + 0.018 * (1 + math.sqrt(0.5)) / 2)
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert learning_rate(replace(config, warmup=0), 0) == 0.02
    train(replace(config, steps=6))
    logged = [record["lr"] for record in steps(tmp_path / "run")]
    assert logged == [learning_rate(replace(config, steps=6), step) for step in range(6)]


def test_weight_decay_shrinks_matrices_and_no_vectors(tmp_path: Path) -> None:
    config = small(tmp_path / "run", weight_decay=0.5, beta1=0.8, beta2=0.95)
    model = build_model(config, 21)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = make_optimiser(model, config)
    grouped = [p for group in optimiser.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert all(group["betas"] == (0.8, 0.95) for group in optimiser.param_groups)
    for group in optimiser.param_groups:
        group["lr"] = 0.1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert kept == {
        *("block.dynamics.alpha", "block.dynamics.up.bias", "block.dynamics.down.bias"),
        *(f"block.dynamics.norm{n}.{part}" for n in (1, 2) for part in ("weight", "bias")),
        *("norm.weight", "norm.bias"),
    }
    for name, p in model.named_parameters():
        if name not in kept:
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("batch", 0), ("eval_every", 0), ("eval_windows", -1), ("context", 0)),
        *(("lr", 0.0), ("lr", math.nan), ("clip", -1.0), ("free_limit", 0.0)),
        *(("warmup", -1), ("weight_decay", -0.1), ("beta1", 1.0), ("beta2", -0.1), ("seed", -1)),
        *(("ema", 1.0), ("ema", -0.1), ("refused_in_a_row", 0), ("final_windows", 0)),
        *(("on_failure", "ignore"), ("block", "gatd"), ("heads", 3), ("seed", 2**63)),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{name: value})


def test_resume_and_overwrite_exclude_each_other_and_resume_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        TrainConfig(out=Path("x"), resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="--out FOLDER --resume"):
        TrainConfig(resume=True)


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = small(tmp_path / "run", device="abacus")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used here .*: try cpu"):
        train(config)
    assert tree(tmp_path) == before
