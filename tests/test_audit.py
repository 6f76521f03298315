"""An audit says how far gradients agree, and never more than it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altprop import (
    AEP,
    BPTT,
    EP,
    AbstractRule,
    Anderson,
    Arm,
    Backprop,
    ConfigError,
    DampedAttention,
    Equilibrium,
    Euler,
    FeedbackAlignment,
    Implicit,
    PublishedEP,
    RuleError,
    Trial,
    audit,
    audit_trials,
)
from altprop.auditing.agreement import Flag

EXACT = Arm(BPTT(), Euler(0.3, 50))


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Layer(nn.Module):
    """One equilibrium after whatever `before` does."""

    def __init__(self, before: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = before or nn.Identity()
        self.block = Equilibrium(DampedAttention(16, heads=2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.before(x))


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 2, 8, 16, generator=generator, dtype=torch.float64)
    return x, y


def test_aep_and_implicit_equal_the_reference_and_ep_does_not() -> None:
    model = Layer()
    report = audit(model, pair(), mean_square, [AEP(), Implicit(), EP()], EXACT, repeats=0)
    names = [row.arm.name for row in report.rows]
    assert names == ["AEP", "Implicit", "EP"]
    aep, implicit, ep = report.rows
    assert list(aep.parameters) == ["W_Q", "W_K", "W_V", "W_O"]
    for row in (aep, implicit):
        assert row.worst("cosine") > 0.9999 and row.worst("norm_ratio") == pytest.approx(
            1, abs=1e-3
        )
    assert ep.worst("cosine") < 0.99
    assert report.reference.arm.name == "BPTT, Euler(step=0.3, max_steps=50)"
    assert report.reference.measured[0].evaluations == 101


def test_the_json_form_holds_every_figure(tmp_path: Path) -> None:
    batches = [pair(0), pair(1)]
    report = audit(
        Layer(), batches, mean_square, [Arm(AEP(response=1e-3), name="mine")], EXACT, repeats=1
    )
    content = json.loads(report.write_json(tmp_path / "audit.json").read_text())
    assert content == json.loads(report.to_json())
    (row,) = content["rows"]
    assert row["estimator"] == "mine" and row["rule"].startswith("AEP(")
    for figure in ("cosine", "norm_ratio", "relative_error", "sign_agreement"):
        values = [t.parameters["W_V"].__getattribute__(figure) for t in report.rows[0].outcomes]
        found = row["parameters"]["W_V"]
        assert found[figure] == pytest.approx(sum(values) / 2)
        assert found["half_width_95"][figure] == pytest.approx(
            12.706 * abs(values[0] - values[1]) / 2, rel=1e-3, abs=1e-12
        )
        assert found["worst"][figure] in values
    assert row["evaluations"] > 0 and row["milliseconds"] > 0 and row["peak_bytes"] > 0
    assert 0 < row["residuals"]["free"] < 1e-3 and 0 < row["residuals"]["adjoint"] <= AEP().tol
    assert row["response"] == pytest.approx(1e-3, rel=0.5) and row["beta"] > 0
    assert content["trials"] == ["batch 0", "batch 1"]
    assert content["reference"]["norms"].keys() == row["parameters"].keys()


def test_memory_grows_with_the_relaxation_under_bptt_alone() -> None:
    def peaks(steps: int) -> list[int]:
        solver = Euler(0.3, steps)
        arms = [Arm(Implicit(max_steps=200), solver)]
        reference = Arm(BPTT(), solver)
        report = audit(Layer(), pair(), mean_square, arms, reference, repeats=0)
        return [report.reference.cost.peak_bytes, report.rows[0].cost.peak_bytes]

    (bptt_short, implicit_short), (bptt_long, implicit_long) = peaks(20), peaks(40)
    assert bptt_long > 1.7 * bptt_short and implicit_long == implicit_short


def test_a_rule_is_never_compared_with_itself() -> None:
    model = Layer()
    for rule, reference in [
        (EXACT, Arm(BPTT(), Euler(0.3, 50), name="another name")),
        (AEP(), Arm(AEP(), Anderson())),  # the model's own solver
    ]:
        with pytest.raises(ConfigError, match="is the reference itself"):
            audit(model, pair(), mean_square, [rule], reference)
    report = audit(model, pair(), mean_square, [Arm(AEP(), Euler(0.3, 100, 1e-5))], AEP())
    assert report.rows[0].worst("cosine") > 0.999  # another solver is another gradient


class Counting(nn.Module):
    """Drops out features and counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.dropout(x, 0.5) * self.calls


def test_every_arm_sees_the_same_draws_and_buffers_and_the_model_is_left_as_found() -> None:
    model = Layer(Counting())
    state, own = torch.get_rng_state(), (model.block.solver, model.block.estimator)
    report = audit(model, pair(), mean_square, [AEP(), Implicit()], EXACT, repeats=1)
    assert all(row.worst("cosine") > 0.9999 for row in report.rows)
    assert model.before.calls == 0 and torch.equal(torch.get_rng_state(), state)
    assert (model.block.solver, model.block.estimator) == own
    assert model.block.on_failure == "raise" and not model.block._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_model_may_return_its_loss_and_pass_the_cost_on() -> None:
    class Problem(Layer):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            def cost(z: Tensor) -> Tensor:
                return mean_square(z, y)

            return cost(self.block(x, cost=cost))

    report = audit(Problem(), pair(), None, [Arm(PublishedEP(), Euler(0.3, 50))], EXACT, repeats=0)
    assert 0.3 < report.rows[0].worst("cosine") < 0.99
    with pytest.raises(RuleError, match="cost="):
        audit(Layer(), pair(), mean_square, [Arm(PublishedEP(), Euler(0.3, 50))], EXACT)


def test_evaluations_of_an_equilibrium_used_twice_add_up() -> None:
    class Twice(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    report = audit(Twice(), pair(), mean_square, [AEP()], EXACT, repeats=0)
    assert report.reference.measured[0].evaluations == 2 * 101
    assert report.rows[0].worst("cosine") > 0.9999


def test_a_solve_that_fails_is_reported_and_a_lost_gradient_is_no_figure(tmp_path: Path) -> None:
    lost = Arm(PublishedEP(step=1e20, steps=30, nudge="linear"), name="lost")
    early = Arm(AEP(), Anderson(max_steps=2), name="early")
    report = audit(Layer(), pair(), mean_square, [lost, early], EXACT, repeats=0)
    assert report.rows[0].mean("cosine").mean is None
    assert set(report.rows[0].parameters["W_Q"].flags) == {Flag.NON_FINITE}
    assert any("free phase not solved" in failure for failure in report.rows[1].failures)
    row = json.loads(report.to_json())["rows"][0]
    assert row["parameters"]["W_Q"]["cosine"] is None and row["flags"]
    assert "its gradient is not finite in 1 of 1" in str(report)
    assert report.plot(tmp_path / "a.png").stat().st_size > 5000


def test_feedback_alignment_is_audited_on_a_model_without_an_equilibrium() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).double()
    names = list(model.state_dict())
    report = audit(model, pair(), mean_square, [FeedbackAlignment()], Backprop())
    (row,) = report.rows
    assert row.parameters["2.weight"].figures["cosine"].mean == pytest.approx(1.0)
    assert row.parameters["0.weight"].figures["cosine"].mean < 0.9
    assert row.outcomes[0].measured.evaluations is None and row.cost.milliseconds > 0
    assert list(model.state_dict()) == names
    assert "MiB" in str(report) and "evaluations" not in str(report)  # there are none


@dataclass(frozen=True)
class Foreign(AbstractRule):
    """A rule of a seam that there is not."""

    seam = "elsewhere"  # type: ignore[assignment]

    def plan(self, scope: object) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": []}, "expected a list such as"),
        ({"rules": AEP()}, "expected a list such as"),
        ({"rules": [AEP]}, r"rules\[0\] is the class AEP.*write AEP\(\)"),
        ({"rules": [AEP(), Arm(AEP(tol=1e-2), name="AEP")]}, "several arms are called AEP"),
        ({"rules": [Foreign()]}, "an audit takes rules of these seams: adjoint"),
        ({"reference": "BPTT"}, "reference is 'BPTT', expected a rule or an Arm"),
        ({"reference": BPTT()}, "BPTT differentiates a stated relaxation"),
        ({"repeats": -1}, "repeats is -1"),
        ({"batch": 3}, r"expected a pair \(input, target\)"),
        ({"batch": []}, "at least one"),
        ({"loss_fn": "mse"}, r"expected loss_fn\(output, target\)"),
        ({"loss_fn": lambda z, y: z - y}, r"the loss is shape \(2, 8, 16\)"),
        ({"loss_fn": lambda z, y: y.sum()}, "depends on no trainable parameter"),
        ({"model": nn.Linear(16, 16).double()}, "Linear has none: build the model with"),
        ({"model": Layer().requires_grad_(False)}, "no trainable parameter"),
    ],
)
def test_bad_input_is_refused_in_a_line(arguments: dict[str, Any], message: str) -> None:
    usual = {"model": Layer(), "batch": pair(), "loss_fn": mean_square, "rules": [AEP()],
             "reference": EXACT}  # fmt: skip
    with pytest.raises((ConfigError, RuleError), match=message) as caught:
        audit(**{**usual, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"estimator": AEP}, {"estimator": AEP(), "solver": 1e-3}])
def test_an_arm_checks_what_it_is_given(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"write Arm\("):
        Arm(**arguments)


def test_trials_must_have_the_same_parameters() -> None:
    def trials() -> Iterator[Trial]:
        for model in (Layer(), Layer(nn.Linear(16, 16))):
            yield Trial(model, lambda model=model: mean_square(model(pair()[0]), pair()[1]), "odd")

    with pytest.raises(ConfigError, match="other parameters than the first"):
        audit_trials(trials(), [AEP()], EXACT, repeats=0)
