"""What an audit's figures are of: gradients and certificates by hand, and averages by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop import AbstractArm
from altprop.auditing.agreement import Agreement, Flag
from altprop.auditing.measure import trainable
from altprop.auditing.rows import Cost, Measured, Outcome, Reference, Row, Words

Gradients = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            size * torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.randn(5, 3, generator=generator, dtype=torch.float64),
        )
        for size in (1.0, 0.2, 5.0)  # so that means of norms are no norms of means
    ]


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def taken(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Gradients:
    loss = mean_square(model(batch[0]), batch[1])
    leaves = dict(model.named_parameters())
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def by_hand(found: Tensor, exact: Tensor) -> dict[str, float]:
    a, b = found.flatten(), exact.flatten()
    return {
        "cosine": float(a @ b / (a.norm() * b.norm())),
        "norm_ratio": float(a.norm() / b.norm()),
        "relative_error": float((a - b).norm() / b.norm()),
        "sign_agreement": float((a * b > 0).double().mean()),
    }


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def test_figures_and_norms_are_those_of_every_trial_and_means_are_over_trials() -> None:
    rule = ap.FeedbackAlignment(std=0.5)
    exact = [taken(network(), batch) for batch in batches()]
    model = ap.convert(network(), rule, seed=3)
    rules = [taken(model, batch) for batch in batches()]
    arm = ap.RuleArm(rule, seed=3)
    report = ap.audit(network(), batches(), mean_square, [arm], ap.Backprop(), repeats=0)
    norms = report.reference.norms
    assert norms.keys() == exact[0].keys()
    for name in norms:
        mean = sum(float(g[name].norm()) for g in exact) / 3
        assert norms[name] == pytest.approx(mean, rel=1e-12)
    (row,) = report.rows
    figures = [
        {name: by_hand(r[name], e[name]) for name in e} for r, e in zip(rules, exact, strict=True)
    ]
    whole = [by_hand(flat(r), flat(e)) for r, e in zip(rules, exact, strict=True)]
    for figure in ("cosine", "norm_ratio", "relative_error", "sign_agreement"):
        for name, found in row.parameters.items():
            values = [trial[name][figure] for trial in figures]
            assert found.figures[figure].mean == pytest.approx(sum(values) / 3, abs=1e-9)
        values = [trial[figure] for trial in whole]
        assert row.whole.figures[figure].mean == pytest.approx(sum(values) / 3, abs=1e-9)
        # a mean over parameters in each trial; its interval is that of the trials
        means = [sum(p[figure] for p in trial.values()) / 4 for trial in figures]
        assert row.per_trial(figure) == pytest.approx(means, abs=1e-9)
        spread = math.sqrt(sum((m - sum(means) / 3) ** 2 for m in means) / 2)
        assert row.mean(figure).mean == pytest.approx(sum(means) / 3, abs=1e-9)
        assert row.mean(figure).half_width == pytest.approx(
            4.302653 * spread / math.sqrt(3), rel=1e-5, abs=1e-9
        )
    every = [p for trial in figures for p in trial.values()]
    assert row.worst("cosine") == pytest.approx(min(p["cosine"] for p in every))
    assert row.worst("relative_error") == pytest.approx(max(p["relative_error"] for p in every))
    farthest = max((p["norm_ratio"] for p in every), key=lambda r: abs(math.log(r)))
    assert row.worst("norm_ratio") == pytest.approx(farthest)
    ratios = [sum(trial[name]["norm_ratio"] for trial in figures) / 3 for name in norms]
    assert row.spread == pytest.approx(max(ratios) / min(ratios))


def test_another_seed_is_another_arm_with_another_feedback() -> None:
    rule = ap.FeedbackAlignment(std=0.5)
    arms = [ap.RuleArm(rule, seed=seed, name=str(seed)) for seed in (0, 1)]
    report = ap.audit(network(), batches(), mean_square, arms, ap.Backprop(), repeats=0)
    first, second = (row.parameters["0.weight"].figures["cosine"].mean for row in report.rows)
    assert first != second
    with pytest.raises(ap.ConfigError, match="is the reference itself"):
        ap.audit(network(), batches(), mean_square, [ap.RuleArm(rule, seed=0, name="b")], arms[0])
    ap.audit(network(), batches(), mean_square, [arms[1]], arms[0], repeats=0)


def test_a_converted_model_is_audited_as_it_stands_part_by_part_and_its_feedback_is_no_part() -> (
    None
):
    rule = ap.KolenPollack()
    drawn = ap.audit(
        network(), batches(), mean_square, [ap.RuleArm(rule, seed=3)], ap.Backprop(), repeats=0
    )
    model = ap.convert(network(), rule, seed=3)
    arms, exact = [ap.Installed()], ap.Installed(exact=True)
    each = ap.audit(model, batches(), mean_square, arms, exact, repeats=0)
    assert each.rows[0].parameters == drawn.rows[0].parameters
    layers = ap.audit(
        model, batches(), mean_square, arms, exact, repeats=0, by=lambda name: name.split(".")[0]
    )
    assert list(layers.rows[0].parameters) == ["0", "2"]
    assert layers.rows[0].whole == drawn.rows[0].whole

    first = [flat({n: g for n, g in taken(network(), b).items() if n[0] == "0"}) for b in batches()]
    assert layers.reference.norms["0"] == pytest.approx(sum(float(g.norm()) for g in first) / 3)
    with torch.no_grad():
        ap.feedback_parameters(model)[-1].mul_(-1)  # what it has learned is what is looked at
    other = ap.audit(model, batches(), mean_square, arms, exact, repeats=0)
    assert other.rows[0].parameters["0.weight"] != each.rows[0].parameters["0.weight"]


def test_a_frozen_parameter_is_no_part_of_an_audit() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    report = ap.audit(
        model, batches(), mean_square, [ap.FeedbackAlignment()], ap.Backprop(), repeats=0
    )
    assert list(report.reference.norms) == ["0.weight", "2.weight", "2.bias"]


def test_a_floor_reaches_every_trial() -> None:
    model = network()
    exact = [taken(model, batch) for batch in batches()]
    shares = [[float(g[n].norm() / flat(g).norm()) for g in exact] for n in exact[0]]
    lowest = min(range(4), key=lambda i: max(shares[i]))
    floor = max(shares[lowest])
    arms = [ap.FeedbackAlignment()]
    report = ap.audit(
        model, batches(), mean_square, arms, ap.Backprop(), repeats=0, floor=1.001 * floor
    )
    name = list(exact[0])[lowest]
    assert report.rows[0].flags[name] == {Flag.REFERENCE_FLOOR.value: 3}


def test_only_the_first_trial_is_timed_and_no_gradient_of_the_users_is_touched() -> None:
    model, calls = network(), [0]
    mine = [torch.randn_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), mine, strict=True):
        p.grad = g.clone()

    def counted(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        return mean_square(output, target)

    arms = [ap.FeedbackAlignment(), ap.SignSymmetry()]
    report = ap.audit(model, batches(), counted, arms, ap.Backprop(), repeats=2)
    # each arm and the reference: once in each trial, twice for the time, once for the memory
    assert calls[0] == 3 * 3 + 3 * (2 + 1)
    assert all(row.cost.milliseconds > 0 and row.cost.peak_bytes > 0 for row in report.rows)
    for p, g in zip(model.parameters(), mine, strict=True):
        assert torch.equal(p.grad, g)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            ap.Equilibrium(ap.DampedAttention(4, heads=1, scale=s), ap.Anderson(tol=t))
            for s, t in ((0.3, 1e-2), (1.0, 1e-5))
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    "rule", [ap.AEP(response=1e-2), ap.EP(sides=1), ap.DyadicEP(), ap.OneStep()], ids=repr
)
def test_what_is_measured_is_what_the_certificates_of_all_solves_say(
    rule: ap.AbstractEstimator,
) -> None:
    x, y = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    model = Two()
    for block in (model.first, model.second):
        block.estimator = rule
    mean_square(model(x), y).backward()
    told = [model.first.certificate, model.second.certificate]
    report = ap.audit(Two(), (x, y), mean_square, [rule], ap.Implicit(tol=1e-8), repeats=0)
    found = report.rows[0].outcomes[0].measured

    def worst(name: str) -> float | None:
        known = [getattr(c, name) for c in told if getattr(c, name) is not None]
        return max((float(v.max()) for v in known), default=None)

    assert found.evaluations == sum(c.free_evaluations + c.adjoint_evaluations for c in told)
    for mine, theirs in (
        ("free_residual", "free_residual"),
        ("adjoint_residual", "adjoint_residual"),
        ("nudged_residual", "nudged_residuals"),
        ("response", "response"),
        ("antisymmetry", "antisymmetry"),
    ):
        assert getattr(found, mine) == worst(theirs), mine
    if told[0].beta is None:
        assert found.beta is None
    else:
        assert found.beta == pytest.approx(float(torch.cat([c.beta for c in told]).mean()))


def test_a_rows_cost_is_a_mean_of_efforts_and_the_worst_of_errors() -> None:
    one = Measured(10, 1e-3, 2e-3, 0.1, 3e-3, 5e-3, 0.2, ("a", "b"))
    two = Measured(30, 3e-3, 1e-3, 0.3, 1e-3, 4e-3, 0.6, ("b", "c"))
    none = Measured()
    agreement = Agreement(1.0, 1.0, 0.0, 1.0, True)
    outcomes = [Outcome({"w": agreement}, agreement, m) for m in (one, none, two)]
    words, cost = Words("arm", "rule", None), Cost(7.0, 3 * 2**20)
    for content in (
        Row(words, outcomes, cost).as_dict(),
        Reference(words, {}, [one, none, two], cost).as_dict(),
    ):
        assert content["evaluations"] == 20 and content["beta"] == pytest.approx(0.2)
        assert content["residuals"] == {"free": 3e-3, "adjoint": 2e-3, "nudged": 5e-3}
        assert content["antisymmetry"] == 0.6 and content["response"] == 3e-3
        assert content["milliseconds"] == 7.0 and content["peak_bytes"] == 3 * 2**20
        assert content["failures"] == ["a", "b", "c"]
    assert Row(words, [outcomes[1]], cost).as_dict()["evaluations"] is None


def test_a_trial_without_a_figure_is_left_out_of_means_and_not_counted_as_zero() -> None:
    some = {"v": Agreement(0.5, 2.0, 1.0, 1.0, True), "w": Agreement(flag=Flag.REFERENCE_FLOOR)}
    other = {"v": Agreement(0.9, 1.0, 0.1, 1.0, False), "w": Agreement(0.1, 4.0, 0.2, 1.0, True)}
    lost = {"v": Agreement(flag=Flag.NON_FINITE), "w": Agreement(flag=Flag.NON_FINITE)}
    outcomes = [Outcome(p, p["v"], Measured()) for p in (some, other, lost)]
    row = Row(Words("arm", "rule", None), outcomes, Cost(None, 0))
    assert row.per_trial("cosine") == [0.5, pytest.approx(0.5), None]
    assert row.mean("cosine").mean == pytest.approx(0.5) and row.mean("cosine").count == 2
    assert row.parameters["w"].figures["cosine"].mean == 0.1
    assert row.parameters["w"].figures["cosine"].count == 1
    assert row.whole.descends == 0.5 and row.parameters["w"].descends == 1.0
    assert row.worst("cosine") == 0.1 and row.worst("norm_ratio") == 4.0
    assert row.spread == pytest.approx(4.0 / 1.5)
    assert row.flags == {
        "v": {Flag.NON_FINITE.value: 1},
        "w": {Flag.REFERENCE_FLOOR.value: 1, Flag.NON_FINITE.value: 1},
    }


def test_the_json_form_has_no_numbers_that_json_lacks() -> None:
    bad = Agreement(0.5, math.inf, math.nan, 1.0, True)
    outcomes = [Outcome({"w": bad}, bad, Measured(free_residual=math.inf))]
    words = Words("arm", "rule", None)
    row = Row(words, outcomes, Cost(None, 0))
    reference = Reference(words, {"w": math.nan}, [], Cost(None, 0))
    report = ap.AuditReport(reference, [row], ["one"], {"versions": [math.nan, 1.5]})
    content = json.loads(report.to_json())
    assert content["reference"]["norms"] == {"w": None} and content["versions"] == [None, 1.5]
    assert content["rows"][0]["parameters"]["w"]["norm_ratio"] is None
    assert content["rows"][0]["residuals"]["free"] is None


@dataclass(frozen=True)
class Times(AbstractArm):
    """Multiplies every gradient."""

    factor: float

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        hooks = [p.register_hook(lambda g: self.factor * g) for p in model.parameters()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def identity(self, model: nn.Module) -> float:
        return self.factor

    def describe(self) -> Words:
        return Words(f"times {self.factor}", repr(self), None)


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize(
    ("factor", "error"), [(1.0, 0.0), (1.1, 0.1 / 1.1), (-1.0, 2.0), (0.0, math.inf)]
)
def test_finite_differences_measure_the_relative_error_of_a_gradient(
    factor: float, error: float, directions: int
) -> None:
    class Noisy(nn.Module):
        """Draws, counts its calls, and has a parameter at zero: each difference sees the same."""

        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.linspace(-1, 2, 5).double())
            self.z = nn.Parameter(torch.zeros(3).double())
            self.register_buffer("calls", torch.ones(()).double())

        def forward(self) -> Tensor:
            self.calls += 1
            kept = torch.rand(5).double() * self.calls
            return (kept * torch.sin(self.v)).sum() + (self.z**2 + self.z).sum()

    model = Noisy()
    before = [t.detach().clone() for t in (model.v, model.z, model.calls)]
    errors = ap.finite_difference_errors(model, model, Times(factor), directions=directions)
    assert errors == pytest.approx({"v": error, "z": error}, rel=1e-6, abs=1e-8)
    for now, then in zip((model.v, model.z, model.calls), before, strict=True):
        assert torch.equal(now, then)


def test_an_arm_of_another_kind_plugs_in() -> None:
    report = ap.audit(network(), batches(), mean_square, [Times(-1.0)], ap.Backprop(), repeats=0)
    (row,) = report.rows
    assert row.worst("cosine") == pytest.approx(-1.0) and row.whole.descends == 0.0


def test_finite_differences_of_float32_are_refused() -> None:
    with pytest.raises(ap.ConfigError, match=r"write model\.double\(\)"):
        ap.finite_difference_errors(lambda: torch.zeros(()), network().float(), Times(1.0))


def test_names_drop_what_all_parameters_share_but_their_last_part() -> None:
    assert list(trainable(nn.Linear(2, 2))) == ["weight", "bias"]
    assert list(trainable(nn.Sequential(nn.Sequential(nn.Linear(4, 4))))) == ["weight", "bias"]
    alone = nn.Sequential(nn.Sequential(nn.Linear(4, 4, bias=False)))
    assert list(trainable(alone)) == ["weight"]
    block = ap.Equilibrium(ap.DampedAttention(4, 2))
    assert list(trainable(block)) == ["W_Q", "W_K", "W_V", "W_O"]
    both = list(trainable(nn.Sequential(nn.Linear(4, 4), block)))
    assert both[:3] == ["0.weight", "0.bias", "1.dynamics.attention.W_Q"]
