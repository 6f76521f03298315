"""An audit says how far gradients agree, and never more than it knows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    AbstractArm,
    AbstractRule,
    Anderson,
    Arm,
    AuditReport,
    Backprop,
    ConfigError,
    DampedAttention,
    DataError,
    Equilibrium,
    Euler,
    FeedbackAlignment,
    GatedBlock,
    Implicit,
    PublishedEP,
    RuleError,
    Trial,
    audit,
    audit_trials,
    finite_difference_errors,
)
from altprop.auditing.agreement import Agreements, Flag, compare, compare_all, summarise
from altprop.auditing.measure import trainable
from altprop.auditing.rows import Words

EXACT = Arm(BPTT(), Euler(0.3, 50))


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Layer(nn.Module):
    """One equilibrium after whatever `before` does."""

    def __init__(self, before: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = before or nn.Identity()
        self.block = Equilibrium(DampedAttention(16, heads=2))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.before(x))


def pair(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 2, 8, 16, generator=generator, dtype=torch.float64).to(dtype)
    return x, y


# ------------------------------------------------------------------------------------- agreement


def test_figures_equal_those_computed_by_hand() -> None:
    found = compare(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, -3.0]]))
    assert found.cosine == pytest.approx(0.0) and found.descends is False
    found = compare(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]))
    assert found.cosine == pytest.approx(24 / 25)
    assert found.norm_ratio == pytest.approx(1.0)
    assert found.relative_error == pytest.approx(math.sqrt(2) / 5)
    assert found.sign_agreement == 1.0 and found.descends is True and found.flag is None
    assert compare(torch.tensor([-2.0]), torch.tensor([1.0])).norm_ratio == pytest.approx(2.0)
    assert compare(torch.tensor([-2.0]), torch.tensor([1.0])).cosine == -1.0


def test_signs_are_compared_where_the_reference_has_one() -> None:
    reference = torch.tensor([1.0, -1.0, 2.0, 0.0])
    assert compare(torch.tensor([1.0, 1.0, 0.0, 5.0]), reference).sign_agreement == 1 / 3


def test_a_zero_gradient_has_no_cosine_and_lowers_every_other_figure() -> None:
    found = compare(torch.zeros(3), torch.ones(3))
    assert found.cosine is None and found.flag is Flag.ZERO
    assert (found.norm_ratio, found.relative_error, found.sign_agreement) == (0.0, 1.0, 0.0)
    assert found.descends is False


@pytest.mark.parametrize(
    ("gradient", "reference", "flag"),
    [
        (1.0, 0.0, Flag.REFERENCE_ZERO),
        (0.0, 0.0, Flag.REFERENCE_ZERO),
        (1.0, 1e-4, Flag.REFERENCE_FLOOR),
        (1.0, math.nan, Flag.REFERENCE_NON_FINITE),
        (math.nan, 1.0, Flag.NON_FINITE),
        (math.inf, 1.0, Flag.NON_FINITE),
    ],
)
def test_what_means_nothing_is_flagged_and_has_no_figure(
    gradient: float, reference: float, flag: Flag
) -> None:
    found = compare(torch.full((2,), gradient), torch.full((2,), reference), floor=1e-3)
    assert found.flag is flag
    assert found.cosine is found.norm_ratio is found.relative_error is found.descends is None


def test_undefined_figures_enter_no_mean() -> None:
    good = compare(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
    agreements = Agreements([good, compare(torch.zeros(2), torch.ones(2))])
    assert agreements.figures["cosine"].mean == good.cosine
    assert agreements.figures["cosine"].count == 1
    assert agreements.flags == {Flag.ZERO: 1} and agreements.descends == 0.5


def test_a_gradient_that_is_zero_but_for_rounding_is_left_out() -> None:
    # What a norm subtracts has no gradient: float32 leaves a remainder that points anywhere.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False))
    shift = nn.Parameter(torch.zeros(()))  # added to every feature, and taken out again
    loss = (model[1](model[0](torch.randn(64, 8)) + shift) * torch.randn(64, 8)).mean()
    weight, constant = torch.autograd.grad(loss, [model[0].weight, shift])
    reference = {"weight": weight, "shift": constant}
    assert 0 < constant.abs() < 1e-6
    named, whole = compare_all({"weight": weight, "shift": -constant}, reference)
    assert named["shift"].flag is Flag.REFERENCE_FLOOR and named["weight"].cosine == 1.0
    assert whole.cosine == pytest.approx(1.0)


def test_gradients_of_other_shapes_or_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\) with a reference of shape \(2,\)"):
        compare(torch.ones(3), torch.ones(2))
    with pytest.raises(ConfigError, match="on one side only: b"):
        compare_all({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)})


def test_a_summary_has_the_t_interval_and_the_value_farthest_from_ideal() -> None:
    summary = summarise("cosine", [0.7, 0.8, 0.9])
    assert summary.mean == pytest.approx(0.8) and summary.worst == 0.7
    assert summary.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-4)
    assert summarise("norm_ratio", [0.4, 2.0]).worst == 0.4  # by its logarithm
    assert summarise("relative_error", [0.1, 0.3]).worst == 0.3
    assert summarise("cosine", [0.7]).half_width is None


# ----------------------------------------------------------------------------------------- audit


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


@dataclass(frozen=True)
class Reversed(AbstractArm):
    """Turns every gradient round; knows no Equilibrium."""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        hooks = [p.register_hook(torch.neg) for p in model.parameters()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def identity(self, model: nn.Module) -> str:
        return "reversed"

    def describe(self) -> Words:
        return Words("reversed", repr(self), None)


def test_an_arm_of_another_kind_plugs_in() -> None:
    report = audit(Layer(), pair(), mean_square, [Reversed()], AEP(), repeats=0)
    (row,) = report.rows
    assert row.worst("cosine") == pytest.approx(-1.0) and row.whole.descends == 0.0


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


def test_names_drop_what_all_parameters_share() -> None:
    assert list(trainable(Layer())) == ["W_Q", "W_K", "W_V", "W_O"]
    assert list(trainable(nn.Linear(2, 2))) == ["weight", "bias"]
    both = list(trainable(Layer(nn.Linear(16, 16))))
    assert both[:3] == ["before.weight", "before.bias", "block.dynamics.attention.W_Q"]


def test_finite_differences_confirm_an_exact_gradient_and_expose_a_biased_one() -> None:
    model = Layer()
    x, y = pair()

    def loss() -> Tensor:
        return mean_square(model(x), y)

    before = [p.clone() for p in model.parameters()]
    exact = finite_difference_errors(loss, model, Arm(BPTT(), Euler(0.3, 30)), directions=2)
    assert list(exact) == ["W_Q", "W_K", "W_V", "W_O"] and max(exact.values()) < 1e-8
    tight = Anderson(tol=1e-11, max_steps=200)
    biased = finite_difference_errors(loss, model, Arm(EP(), tight), directions=2)
    assert max(biased.values()) > 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"write model\.double\(\)"):
        finite_difference_errors(loss, model.float(), EXACT)


# ---------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return audit(Layer(), [pair(0), pair(1)], mean_square, [AEP(), EP()], EXACT, repeats=1)


def test_tables_fit_a_terminal_of_100_columns_whole(report: AuditReport) -> None:
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    for word in ("W_Q", "W_O", "EP", "mean ± 95 %", "evaluations", "descends", "BPTT"):
        assert word in text


def test_many_parameters_are_digested_in_tables_and_drawn_on_a_colour_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = GatedBlock(16, heads=2)
    nn.init.constant_(block.alpha, 0.2)
    model = Equilibrium(block.double())
    long = Arm(AEP(), name="AEP under a name that is far too long for any column of a table")
    report = audit(
        model, [pair(0), pair(1)], mean_square, [AEP(), long], Arm(BPTT(), Euler(0.5, 60))
    )
    assert len(report.rows[0].parameters) == 13 and report.rows[0].worst("cosine") > 0.9999
    text = str(report)
    assert "worst at" in text and "mean ratio" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 100 and "0.99999 ± 0.0000" in text
    assert report.plot(tmp_path / "many.png").stat().st_size > 5000


def test_a_cosine_below_1_never_reads_as_1(report: AuditReport) -> None:
    assert report.rows[0].worst("cosine") < 1 and "1.00000" not in str(report)


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: AuditReport
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'pip install "altprop\[plots\]"'):
        report.plot(tmp_path / "audit.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["missing/audit.json", ".", "file/audit.json"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="give the path of a file|there is no folder"):
        AuditReport.check_target(tmp_path / target)
