"""Random numbers in a force: dropout's are one draw per call, and what else is meant is said."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import altprop as ap
from systems import EXACT, TIGHT, flat

PLAIN = ap.Euler(step=0.5, max_steps=12)
ANNOUNCED = "draws random numbers.*draws='replayed'.*draws='fresh'"


class Noisy(ap.AbstractDynamics):
    """`F = x − z + tanh(W z)/3 + σ ε`, with `ε` drawn anew by every evaluation; it keeps them."""

    def __init__(self, sigma: float = 0.1, part: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.part, self.sigma = nn.Linear(4, 4), part or nn.Identity(), sigma
        self.seen: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        noise = torch.randn_like(z)
        self.seen.append(noise)
        return x - z + self.part(torch.tanh(self.inner(z))) / 3 + self.sigma * noise

    def distinct(self) -> int:
        return len({tuple(noise.flatten().tolist()) for noise in self.seen})


def noisy(draws: Any = False, **settings: Any) -> Noisy:
    dynamics = Noisy(**settings).double()
    dynamics.draws = draws
    return dynamics


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", [nn.Identity(), nn.Dropout(0.4)], ids=["alone", "with dropout"])
def test_a_force_that_draws_without_a_word_is_announced_once(
    part: nn.Module, training: bool
) -> None:
    dynamics = noisy(part=part).train(training)
    block = ap.Equilibrium(dynamics, TIGHT, EXACT)
    with pytest.warns(RuntimeWarning, match=ANNOUNCED) as said:
        block(X)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert len(dynamics.seen) > 5 and dynamics.distinct() == 1  # it could not have been solved else
    for twin in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        twin(X)  # warnings are errors here


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("draws", ["replayed", True])
def test_replayed_draws_are_the_same_in_all_evaluations_of_a_call(
    draws: Any, training: bool
) -> None:
    dynamics = noisy(draws).train(training)
    block = ap.Equilibrium(dynamics, TIGHT, ap.AEP(tol=1e-9, response=1e-5))
    leaf = X.clone().requires_grad_()
    before = torch.get_rng_state()
    z = block(leaf)
    moved, noise = torch.get_rng_state(), dynamics.seen[0]
    torch.randn(3)  # what somebody else draws is not drawn again
    others = torch.get_rng_state()
    z.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), others)
    assert dynamics.distinct() == 1 and len(dynamics.seen) > 10
    torch.set_rng_state(before)
    assert torch.equal(torch.randn_like(X), noise)
    assert torch.equal(torch.get_rng_state(), moved)  # a call draws what one evaluation draws

    fixed = ap.from_function(
        lambda z, x: x - z + torch.tanh(dynamics.inner(z)) / 3 + 0.1 * noise, dynamics.inner
    )
    wanted = X.clone().requires_grad_()
    ap.Equilibrium(fixed, TIGHT, EXACT)(wanted).square().sum().backward()
    assert torch.allclose(leaf.grad, wanted.grad, rtol=1e-7)
    block(X)
    assert dynamics.distinct() == 2


@pytest.mark.parametrize(
    "part",
    [nn.Dropout(0.4), nn.AlphaDropout(0.2), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))],
    ids=lambda part: type(part).__name__,
)
def test_dropout_needs_no_word(part: nn.Module) -> None:
    given = nn.Sequential(nn.Linear(4, 4), part).double()
    dynamics = ap.from_function(lambda z, x: x - z + given(z) / 9, given)
    block = ap.Equilibrium(dynamics, TIGHT, EXACT)
    first = block(X)
    first.sum().backward()
    assert not torch.equal(first, block(X))
    block.eval()
    assert torch.equal(block(X), block(X))


def test_dropout_inside_attention_and_beside_the_given_modules_needs_none_either() -> None:
    attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True).double()
    drop = nn.Dropout(0.3)

    def force(z: Tensor, x: Tensor) -> Tensor:
        return x - z + drop(attention(z, z, z, need_weights=False)[0]) / 9

    x = torch.randn(2, 3, 4, dtype=torch.float64)
    ap.Equilibrium(ap.from_function(force, attention), TIGHT, EXACT)(x).sum().backward()


def test_dropout_that_is_a_function_is_announced() -> None:
    force = lambda z, x: x - z + nnf.dropout(torch.tanh(z), 0.3) / 3  # noqa: E731
    with pytest.warns(RuntimeWarning, match=ANNOUNCED):
        ap.Equilibrium(ap.from_function(force), TIGHT, EXACT)(X)
    ap.Equilibrium(ap.from_function(force, draws="replayed"), TIGHT, EXACT)(X)


def test_fresh_noise_is_new_in_every_evaluation() -> None:
    dynamics = noisy("fresh")
    block = ap.Equilibrium(dynamics, PLAIN, ap.OneStep())
    block(X).sum().backward()
    made = block.certificate.free_evaluations + 1  # and the question whether samples interact
    assert dynamics.distinct() == len(dynamics.seen) == made > 12


def test_backprop_through_a_noisy_relaxation_is_that_of_its_path() -> None:
    dynamics = noisy("fresh", part=nn.Dropout(0.3))
    block, found = ap.Equilibrium(dynamics, PLAIN, ap.BPTT()), []
    for by_hand in (False, True):
        leaf = X.clone().requires_grad_()
        dynamics.zero_grad()
        torch.manual_seed(7)
        z = leaf if by_hand else block(leaf)
        for _ in range(PLAIN.max_steps if by_hand else 0):
            z = z + PLAIN.step * dynamics(z, leaf)
        z.square().sum().backward()
        found.append(flat([leaf.grad, *(p.grad for p in dynamics.parameters())]))
    assert torch.allclose(*found, rtol=1e-12, atol=1e-14)


def test_a_linearisation_of_a_noisy_force_has_one_draw() -> None:
    dynamics = ap.from_function(
        lambda z, x: x - z + torch.tanh(z * torch.randn_like(z)), draws="fresh"
    )
    products = dynamics.under(X).linearise(X)
    v, a = torch.randn(2, 3, 4, dtype=torch.float64)
    forward, transposed = products.jvp(v), products.vjp(a)
    assert torch.allclose((a * forward).sum(), (v * transposed).sum(), rtol=1e-12)
    assert not torch.equal(dynamics.under(X).linearise(X).jvp(v), forward)


STRICT = [
    ap.Anderson(),
    ap.NewtonKrylov(),
    ap.GMRES(),
    ap.Adaptive(),
    ap.Scattered(),
    ap.Fallback(),
]


@pytest.mark.parametrize("solver", STRICT, ids=lambda solver: type(solver).__name__)
def test_fresh_noise_is_refused_where_evaluations_are_compared(solver: ap.AbstractSolver) -> None:
    dynamics = noisy("fresh")
    message = f"{type(solver).__name__} compares evaluations.*repeatable.*Euler.*'replayed'"
    for block in (
        ap.Equilibrium(dynamics, solver, ap.AEP()),
        ap.Equilibrium(dynamics, PLAIN, ap.AEP(solver=solver)),
    ):
        drawn = torch.get_rng_state()
        with pytest.raises(ap.RuleError, match=message) as error:
            block(X)
        assert "\n" not in str(error.value) and not dynamics.seen
        assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("draws", ["frozen", "Fresh", 1, None])
def test_other_words_for_draws_are_refused(draws: Any) -> None:
    message = "draws is .*expected 'replayed'.*or 'fresh'"
    with pytest.raises(ap.ConfigError, match=message):
        ap.from_function(lambda z, x: x - z, draws=draws)
    with pytest.raises(ap.ConfigError, match=message):
        ap.Equilibrium(noisy(draws))(X)


def test_a_force_that_draws_nothing_is_left_alone() -> None:
    inner = nn.Linear(4, 4).double()
    quiet = ap.from_function(lambda z, x: x - z + torch.tanh(inner(z)) / 3, inner)
    drawn = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ap.Equilibrium(quiet, TIGHT, EXACT)(X).sum().backward()
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("training", [True, False])
def test_a_stack_replays_what_its_blocks_draw_in_any_mode(training: bool) -> None:
    """Its gradient is then backprop's at the noise of its one forward pass."""

    class Jittered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Linear(4, 4)

        def forward(self, h: Tensor) -> Tensor:
            return torch.tanh(self.W(h)) * (1 + 0.3 * torch.randn_like(h))

    blocks = nn.Sequential(*(Jittered() for _ in range(3))).double()
    stack = ap.Equilibrium(ap.Layered(blocks), estimator=ap.AEP(tol=1e-9, response=1e-5))
    found = []
    for forward in (stack.train(training), blocks.train(training)):
        torch.manual_seed(7)
        blocks.zero_grad()
        forward(X).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in blocks.parameters()]))
    assert torch.allclose(*found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "estimator",
    [
        ap.AEP(nudge="cost", tol=1e-9),
        ap.EP(nudge="cost", tol=1e-9),
        ap.DyadicEP(nudge="cost", tol=1e-9),
        ap.PublishedEP(),
        ap.PublishedAEP(),
    ],
    ids=repr,
)
def test_a_cost_draws_in_every_phase_what_the_loss_drew(estimator: ap.AbstractEstimator) -> None:
    """Its gradient is that of the mask which the loss had, and no other draw is touched."""
    inner = nn.Linear(4, 4).double()
    dynamics = ap.from_function(lambda z, x: x - z + torch.tanh(inner(z)) / 3, inner)
    block, drop = ap.Equilibrium(dynamics, TIGHT, estimator), nn.Dropout(0.4)
    mask = torch.empty(0)

    def dropped(z: Tensor) -> Tensor:
        return (drop(torch.ones_like(z)) * z).square().sum()

    def masked(z: Tensor) -> Tensor:
        return (mask * z).square().sum()

    torch.manual_seed(7)
    block(X)
    mask = drop(torch.ones_like(X))
    found = []
    for cost in (dropped, masked):
        leaf = X.clone().requires_grad_()
        inner.zero_grad()
        torch.manual_seed(7)
        loss = cost(block(leaf, cost=cost))
        drawn = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), drawn)
        found.append(flat([leaf.grad, *(p.grad for p in inner.parameters())]))
    assert torch.equal(*found) and bool(mask.eq(0).any())
