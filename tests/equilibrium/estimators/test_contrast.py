"""AEP is judged by the contrast of its phases: on kinks, deep stacks, zeros and hard samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from systems import KINDS, error, exact, gradient, system

TARGET = {torch.float32: 1e-3, torch.float64: 1e-6}
Loss = Callable[[Tensor], Tensor]


def mean_square(out: Tensor) -> Tensor:
    return out.square().mean()


def by_aep(
    model: nn.Module,
    x: Tensor,
    loss: Loss = mean_square,
    estimator: ap.AbstractEstimator | None = None,
) -> tuple[float, ap.Certificate]:
    """Return AEP's worst relative distance to backprop's gradients, and its certificate."""
    plain = copy.deepcopy(model)
    loss(plain(x)).backward()
    ap.convert(model, {"": estimator or ap.AEP()}, on_failure="accept")
    loss(model(x)).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    (equilibrium,) = (e for _, e in ap.equilibria(model))
    errors = [error(p.grad, q.grad) for p, q in pairs if q.grad is not None and q.grad.any()]
    return max(errors), equilibrium.certificate


def stack(width: int, depth: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), act())])


@pytest.mark.parametrize("precision", TARGET, ids=str)
@pytest.mark.parametrize(("width", "seeds"), [(16, 20), (64, 10), (256, 2)])
def test_a_relu_stack_gets_backprops_gradient_at_every_layer(
    width: int, seeds: int, precision: torch.dtype
) -> None:
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, x = stack(width, 3).to(precision), torch.randn(32, width, dtype=precision)
        wrong, seen = by_aep(model, x)
        assert wrong <= TARGET[precision] and seen.adjoint_result


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Hardswish], ids=str)
def test_layers_whose_gradient_is_far_below_the_tops_are_exact_in_float32(
    act: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), act()) for _ in range(20)]
    model = nn.Sequential(*blocks, nn.Linear(16, 3))
    x, y = torch.randn(64, 16), torch.randint(3, (64,))
    wrong, seen = by_aep(model, x, lambda z: nn.functional.cross_entropy(z, y))
    assert wrong <= 1e-3
    # the certificate says that no phase could see so small a level, whose nudge is the top's
    floor = seen.adjoint_floor
    assert floor.shape == (21, 64) and float(floor[0].min()) > 1 > float(floor[-1].max())


@pytest.mark.parametrize("precision", TARGET, ids=str)
@pytest.mark.parametrize("what", ["a sample of zeros", "a pruned row", "both, without biases"])
def test_units_exactly_at_their_kink_raise_nothing_and_keep_autograds_slope(
    what: str, precision: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, x = stack(8, 3).to(precision), torch.randn(4, 8, dtype=precision)
    if what != "a pruned row":
        x[1] = 0
    if what == "both, without biases":
        for m in model[::2]:
            nn.init.zeros_(m.bias)
    if what != "a sample of zeros":
        prune(model)
    wrong, seen = by_aep(model, x)
    assert wrong <= TARGET[precision] and seen.adjoint_result


@torch.no_grad()
def prune(model: nn.Sequential) -> None:
    model[2].weight[3] = 0
    model[2].bias[3] = 0


def test_a_certificate_tells_how_much_of_a_contrast_at_a_kink_was_not_taken() -> None:
    torch.manual_seed(0)
    model = stack(8, 3, lambda: nn.LeakyReLU(0.5)).double()
    prune(model)
    wrong, seen = by_aep(model, torch.randn(4, 8, dtype=torch.float64))
    # the two sides' slopes at 0 are 1/2 and 1, of which autograd takes the first
    assert wrong <= 1e-6 and float(seen.adjoint_floor[3].min()) > 1e-3


@pytest.mark.parametrize("sides", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_linear_problem_has_left_is_all_that_the_contrast_of_smooth_phases_shows(
    kind: str, sides: int
) -> None:
    _, certificate = gradient(system(kind, seed=2), ap.AEP(sides=sides))
    assert float(certificate.adjoint_residual.max()) > 1e-5  # far above the round-off
    # so no sample was given a smaller nudge
    expected = torch.full_like(certificate.response, 1e-6)
    torch.testing.assert_close(certificate.response, expected, rtol=1e-2, atol=0)


class Normed(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(C), nn.Linear(C, C)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.inner(self.norm(h)))


@pytest.mark.parametrize("precision", TARGET, ids=str)
def test_tokens_of_zeros_before_a_norm_are_exact(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Normed(8) for _ in range(3)]).to(precision)
    for block in model:
        nn.init.zeros_(block.inner.bias)
    x = torch.randn(3, 5, 8, dtype=precision)
    x[0, 2:] = 0
    x[1] = 0
    assert by_aep(model, x, lambda z: torch.sin(3 * z).sum())[0] <= TARGET[precision]


class Bent(ap.AbstractDynamics):
    """A force that bends where its input is below `1/bend`, which is small against the state."""

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(5, 5))[0] / 2)
        self.bend = bend

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        moved = torch.tanh(self.bend * (z[:, 1:] @ self.W.T)) / self.bend
        return x - z + nn.functional.pad(moved, (1, 0))


def bent(bend: float, estimator: ap.AbstractEstimator) -> tuple[Tensor, ap.Certificate]:
    """Return the input's gradient on two samples that bend and two on the flat part."""
    torch.manual_seed(0)
    dynamics, x = Bent(bend), torch.randn(4, 6)
    x[:, 1:] *= torch.tensor([0.5, 0.02, 20, 20])[:, None] / bend
    x[:, 0] = 1
    block = ap.Equilibrium(dynamics, ap.Anderson(tol=1e-6, max_steps=200), estimator)
    leaf = x.requires_grad_()
    torch.sin(block(leaf)).sum().backward()
    return leaf.grad, block.certificate


def test_only_samples_that_bend_get_a_smaller_nudge_and_all_are_exact() -> None:
    wanted, _ = bent(1000, ap.Implicit(tol=1e-6))
    got, certificate = bent(1000, ap.AEP())
    assert error(got, wanted) <= 1e-5
    finest = 2.0**-11.5
    expected = torch.tensor([finest / 8, finest / 8, finest, finest])
    torch.testing.assert_close(certificate.response, expected, rtol=1e-3, atol=0)
    # at one nudge for all, the contrast itself is off there, whatever the tolerance
    stiff, _ = bent(1000, ap.AEP(response=finest, tol=1e-4, max_steps=400))
    assert error(stiff, wanted) >= 1e-4


class Wavy(ap.AbstractDynamics):
    """A force whose waves have lengths of `1/rate`, `(B,)`, and slopes of a half."""

    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.rate = rate[:, None]

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + torch.sin(self.rate * (z - 1)) / (2 * self.rate)


def test_a_curvature_of_any_size_takes_one_smaller_nudge() -> None:
    rate = torch.tensor([1.0, 1e3, 1e4, 1e5, 3e5], dtype=torch.float64)
    made = []
    for rows in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):
        solver = ap.Anderson(tol=1e-15, max_steps=200)
        block = ap.Equilibrium(Wavy(rate[rows]), solver, ap.AEP())
        leaf = (1 + 0.3 / rate[rows][:, None].repeat(1, 2)).requires_grad_()
        state = block(leaf)
        state.sum().backward()
        slope = torch.cos(rate[rows][:, None] * (state.detach() - 1)) / 2
        torch.testing.assert_close(leaf.grad, 1 / (1 - slope), rtol=1e-5, atol=0)
        made.append(block.certificate.adjoint_evaluations)
    assert made[1:] == [made[0] + 2] * 5


def test_a_contrast_within_the_tolerance_is_enough_though_no_phase_has_settled() -> None:
    wanted, _ = bent(15, ap.Implicit(tol=1e-6))
    found, certificate = bent(15, ap.AEP(response=2e-2, tol=2e-3))
    assert float(certificate.adjoint_residual.max()) <= 2e-3
    assert float(certificate.nudged_residuals.amax()) > 4e-3  # curvature, which cancels
    assert error(found, wanted) <= 2e-3


class Power(ap.AbstractDynamics):
    """A force with a power of its second number, of a strength `k`, `(B,)`, for each sample."""

    def __init__(self, k: Tensor) -> None:
        super().__init__()
        self.k = k

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        u = z[:, 1]
        bent = self.k * u.sign() * u.abs() ** 1.5
        return x - z + torch.stack([torch.zeros_like(u), bent], 1)


def test_a_sample_keeps_its_own_nudge_whatever_its_batch_mates_need() -> None:
    # too sharp for every nudge; for the first ones; for none
    u, k = torch.tensor([[0.0, 1e-6, 1e-1], [4e3, 3e2, 0.3]], dtype=torch.float64)
    x = torch.stack([torch.ones(3, dtype=torch.float64), u - k * u.abs() ** 1.5], 1)

    def found(rows: list[int]) -> tuple[Tensor, ap.Certificate]:
        solver = ap.Anderson(tol=1e-15, max_steps=200)
        block = ap.Equilibrium(Power(k[rows]), solver, ap.AEP())
        leaf = x[rows].requires_grad_()
        block(leaf)[:, 1].sum().backward()
        return leaf.grad, block.certificate

    together, certificate = found([0, 1, 2])
    assert float(certificate.beta[1]) < float(certificate.beta[2]) / 4
    for row in (1, 2):
        alone, own = found([row])
        assert own.adjoint_result
        torch.testing.assert_close(together[row], alone[0], rtol=1e-9, atol=1e-12)
        slope = 1 - 1.5 * k[row] * u[row] ** 0.5
        torch.testing.assert_close(alone[0, 1], 1 / slope, rtol=1e-4, atol=0)


def test_a_nudge_that_leaves_the_domain_of_the_force_is_made_smaller() -> None:
    class Rooted(ap.AbstractDynamics):
        """A force that has no value a little below its equilibrium at `1 + 1e-7`."""

        def start(self, x: Tensor) -> Tensor:
            return 1 + torch.tensor([[1e-7], [1.0]]).double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x - z + 1e-7**0.5 * (z - 1).sqrt()

    block = ap.Equilibrium(Rooted(), ap.Anderson(tol=1e-15, max_steps=200), ap.AEP())
    leaf = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    block(leaf).sum().backward()
    assert bool(block.certificate.nudged_residuals.isfinite().all())
    torch.testing.assert_close(leaf.grad[0, 0].item(), 2.0, rtol=1e-3, atol=0)


def below_roundoff(**options: Any) -> tuple[float, ap.Certificate]:
    """Return the error and the certificate of AEP at a nudge that float32 does not show."""
    torch.manual_seed(0)
    model = stack(8, 3, nn.Tanh)
    return by_aep(model, torch.randn(4, 8), estimator=ap.AEP(beta=1e-7, **options))


@pytest.mark.parametrize("options", [{"start": "zero"}, {"max_steps": 1}], ids=str)
def test_a_nudge_below_the_roundoff_is_no_success_unless_the_linear_problem_was_solved(
    options: dict[str, Any],
) -> None:
    wrong, certificate = below_roundoff(**options)
    assert wrong > 0.1 and not certificate.adjoint_result
    assert float(certificate.adjoint_residual.max()) > 0.1


def test_a_floor_is_relative_to_the_levels_own_adjoint_at_a_given_nudge_too() -> None:
    right, certificate = below_roundoff()
    assert right <= 1e-5 and certificate.adjoint_result
    torch.manual_seed(0)
    model = stack(8, 3, nn.Tanh)
    levels = [torch.randn(4, 8)]
    for layer in model:
        levels.append(layer(levels[-1]))
        levels[-1].retain_grad()
    mean_square(levels[-1]).backward()
    states = torch.stack([h.detach().norm(dim=1) for h in levels[1:]])
    adjoints = torch.stack([h.grad.norm(dim=1) for h in levels[1:]])
    expected = 4 * torch.finfo(torch.float32).eps * states / 1e-7 / (adjoints / adjoints[-1])
    torch.testing.assert_close(certificate.adjoint_floor, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sides", [1, 4])
def test_one_side_and_two_pairs_tell_of_a_coarse_linear_solution_what_a_pair_tells(
    sides: int,
) -> None:
    s = system("gated", 1)
    pair, other = (gradient(s, ap.AEP(tol=0.05, sides=n))[0] for n in (2, sides))
    assert error(other, pair) <= 1e-6 < error(pair, exact(s))


class Slow(ap.AbstractDynamics):
    """A force with short waves, which settles the slower the nearer `pull` is to 1."""

    def __init__(self, pull: Tensor) -> None:
        super().__init__()
        self.pull = pull[:, None]

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - (1 - self.pull) * z + torch.sin(1e3 * z) / 5e4


def test_a_sample_far_from_its_fixed_point_keeps_its_nudge_and_the_linear_adjoint() -> None:
    pull = torch.tensor([0.0, 0.9], dtype=torch.float64)
    block = ap.Equilibrium(
        Slow(pull), ap.FixedPoint(tol=1e-9, max_steps=8), ap.AEP(), on_failure="accept"
    )
    leaf = torch.linspace(0.5, 1, 6, dtype=torch.float64).repeat(2, 1).requires_grad_()
    state = block(leaf)
    torch.sin(3 * state).sum().backward()
    seen = block.certificate
    assert seen.state_error[0] < 1e-3 and seen.state_error[1] > 0.1
    # it bends as the other does, and only the other's nudge is made smaller for that
    assert seen.response[0] < 1e-6 / 7
    torch.testing.assert_close(float(seen.response[1]), 1e-6, rtol=1e-2, atol=0)
    assert float(seen.adjoint_residual.max()) <= 5e-3 and seen.adjoint_result
    slope = 1 - pull[:, None] - torch.cos(1e3 * seen.state) / 50
    wanted = 3 * torch.cos(3 * state.detach()) / slope
    assert error(leaf.grad[1], wanted[1]) < 5e-3 and error(leaf.grad[0], wanted[0]) < 1e-4
