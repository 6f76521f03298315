"""The module around a dynamics: one definition of the state, one line for every mistake."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap
from altprop.auditing.memory import peak_live_bytes
from altprop.equilibrium.dynamics.plain import observing
from altprop.equilibrium.estimators.problem import Adjoint, Problem
from systems import (
    System,
    damped,
    gated,
    gradients,
    open_gate,
    reference_problem,
    size,
    task,
)


def strong_gate(seed: int) -> System:
    """Return a gated block whose feedback carries real load."""
    torch.manual_seed(seed)
    return task(open_gate(ap.GatedBlock(32, 4, init_std=0.15), 1.0), 3, 16, seed)


def wide_attention(seed: int) -> System:
    torch.manual_seed(seed)
    return task(ap.DampedAttention(32, 4), 3, 16, seed)


def token_change(z: Tensor, other: Tensor) -> float:
    """Return the worst relative change of any token's state."""
    z, other = z.detach(), other.detach()
    return float(((other - z).norm(dim=-1) / z.norm(dim=-1)).max())


@torch.no_grad()
def leak(block: ap.Equilibrium, x: Tensor) -> float:
    """Return how far the states up to `t` move when every token after `t` changes."""
    z, worst = block(x), 0.0
    for t in (0, 4, 10):
        changed = x.clone()
        changed[:, t + 1 :] = torch.randn_like(x[:, t + 1 :]) * x.std()
        worst = max(worst, token_change(z[:, : t + 1], block(changed)[:, : t + 1]))
    return worst


@pytest.mark.parametrize("tol", [7e-4, 1e-5])
@pytest.mark.parametrize("make", [wide_attention, strong_gate, reference_problem])
def test_the_tolerance_bounds_how_far_the_future_leaks(
    make: Callable[[int], System], tol: float
) -> None:
    for seed in range(3):
        this = make(seed)
        seen = leak(this.block(solver=ap.Anderson(tol=tol, max_steps=200)), this.x)
        assert 0 < seen <= 10 * tol


def test_peak_memory_grows_with_the_relaxation_under_bptt_alone() -> None:
    def peak(estimator: ap.AbstractEstimator, steps: int) -> int:
        this = damped(B=2, T=8, C=16, H=2, scale=0.5)
        block = this.block(estimator, solver=ap.Euler(step=0.4, max_steps=steps))
        return peak_live_bytes(lambda: gradients(block, this.x, this.cost))

    for estimator in (ap.AEP(), ap.Implicit(), ap.EP()):
        assert peak(estimator, 100) == peak(estimator, 20)
    assert peak(ap.BPTT(), 100) > 4 * peak(ap.BPTT(), 20)


def test_the_certificate_says_what_was_measured() -> None:
    this = damped(scale=0.5)
    block = this.block(ap.AEP(response=1e-3), solver=ap.Anderson(tol=1e-4))
    calls: list[int] = []
    hook = this.dynamics.register_forward_hook(lambda *_: calls.append(0))
    for _ in range(3):  # in the third call nothing is asked of the force but what it is solved by
        calls.clear()
        z = block(this.x)
    seen = block.certificate
    assert seen.free_evaluations == len(calls) and seen.adjoint_result is None
    hook.remove()
    force = this.dynamics(seen.state, this.x).detach()
    residual = size(force) / size(seen.state)
    assert torch.allclose(seen.free_residual, residual) and float(residual.max()) <= 1e-4
    # the value is one natural step past the state that is certified
    assert torch.equal(z, seen.state + this.dynamics.step * force)
    this.cost(z).backward()
    assert seen is block.certificate and seen.adjoint_result is ap.Result.CONVERGED
    assert float(seen.adjoint_residual.max()) <= 1e-3
    assert seen.adjoint_remainder.shape == z.shape
    assert torch.allclose(seen.response, torch.full_like(seen.response, 1e-3), rtol=0.05)


def test_a_recomputation_leaves_the_certificate_of_the_backward_pass() -> None:
    this = damped()
    block = this.block(ap.AEP())
    leaf = this.x.clone().requires_grad_()
    checkpoint(lambda x: block(torch.cos(x)), leaf, use_reentrant=False).sum().backward()
    assert block.certificate.adjoint_result is ap.Result.CONVERGED


class Counting(ap.AbstractLinearisation):
    """Count the products that an estimator asks for."""

    def __init__(self, inner: ap.AbstractLinearisation) -> None:
        self.inner, self.calls = inner, 0

    def vjp(self, a: Tensor) -> Tensor:
        self.calls += 1
        return self.inner.vjp(a)

    def jvp(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.inner.jvp(v)


@pytest.mark.parametrize(
    "estimator",
    [ap.AEP(), ap.AEP(start="zero"), ap.EP(), ap.Implicit(), ap.PublishedAEP(nudge="linear")],
    ids=repr,
)
def test_the_backward_pass_counts_all_that_it_computes(
    estimator: ap.AbstractEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = damped(scale=0.5)
    seen: list[Counting] = []
    forces: list[int] = []
    plain = this.dynamics.linearise

    def linearise(z: Tensor, x: Tensor) -> Counting:
        seen.append(Counting(plain(z, x)))
        return seen[-1]

    monkeypatch.setattr(this.dynamics, "linearise", linearise)
    block = this.block(estimator)
    z = block(this.x)
    seen.clear()  # of the first call's question whether samples interact
    this.dynamics.register_forward_hook(observing(lambda *_: forces.append(0)))
    this.cost(z).backward()
    made = len(forces) + sum(1 + linearised.calls for linearised in seen)
    assert block.certificate.adjoint_evaluations == made


def test_aep_costs_three_evaluations_more_than_implicit_differentiation() -> None:
    """One force per phase and one JVP confirm what the linear solve found.

    So nothing of the free phase's own residual enters a phase, and what is known is not computed.
    """
    this = reference_problem(0)
    costs = []
    for estimator in (ap.Implicit(tol=1e-3), ap.AEP(tol=2e-3)):  # its start is solved to half
        block = this.block(estimator, solver=ap.Anderson(tol=1e-2))
        this.cost(block(this.x)).backward()
        costs.append(block.certificate.adjoint_evaluations)
    assert costs[1] == costs[0] + 3


@dataclass(frozen=True)
class Spy(ap.AbstractAdjointEstimator):
    """Implicit differentiation that looks around."""

    def adjoint(self, problem: Problem, cotangent: Tensor) -> Adjoint:
        assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        assert cotangent.dtype == problem.state.dtype == torch.float32
        found = ap.Implicit().adjoint(problem, cotangent)
        assert problem.linearise().jvp(cotangent).dtype == torch.float32
        return found


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_everything_inside_is_float32_under_bf16_autocast_but_for_float64(
    given: torch.dtype,
) -> None:
    this = damped(scale=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert this.block()(this.x).dtype == torch.float64
    this.dynamics.float()
    block = this.block(Spy(), solver=ap.Anderson(tol=1e-5))
    x = this.x.to(given).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = block(x)
        assert z.dtype == torch.float32 and float(block.certificate.free_residual.max()) <= 1e-5
        z.sum().backward()  # against torch's advice, and yet the adjoint is in float32
    assert x.grad.dtype == given


class Conditioned(nn.Module):
    """A block, or the moving part of a force, with a condition of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(6, 6), nn.Linear(3, 6)

    def forward(self, h: Tensor, given: dict[str, Tensor], also: Tensor | None = None) -> Tensor:
        moved = self.own(h) + self.other(given["c"])
        return 0.3 * torch.tanh(moved if also is None else moved + self.other(also))


@pytest.mark.parametrize("kind", ["force", "stack"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_under_autocast_further_arguments_are_widened_as_the_input_is(
    kind: str, half: torch.dtype
) -> None:
    torch.manual_seed(0)
    part = Conditioned()
    force = lambda z, x, given, also=None: x - z + part(z, given, also)  # noqa: E731
    made = ap.from_function(force, part) if kind == "force" else ap.Layered([part, Conditioned()])
    block = ap.Equilibrium(made, ap.Anderson(tol=1e-6), ap.Implicit(tol=1e-5))
    x, c, also = torch.randn(2, 6), torch.randn(2, 3).to(half), torch.randn(2, 3).to(half)
    found = []
    for autocast in (True, False):
        leaves = [t.clone().requires_grad_() for t in (c, also)]
        given, more = leaves if autocast else [t.float() for t in leaves]
        block.zero_grad()
        with torch.autocast("cpu", half, enabled=autocast):
            z = block(x, {"c": given}, also=more)
        z.square().sum().backward()
        assert [t.grad.dtype for t in leaves] == [half, half] and z.dtype == torch.float32
        found.append([z, *(t.grad for t in leaves), *(p.grad for p in block.parameters())])
    assert all(torch.equal(*both) and both[0].any() for both in zip(*found, strict=True))


def test_under_autocast_an_argument_without_tensors_in_half_precision_stays_itself() -> None:
    seen: list[Tensor] = []

    def force(z: Tensor, x: Tensor, states: list[Tensor]) -> Tensor:
        states.append(z.detach())
        return x - z

    with torch.autocast("cpu", torch.bfloat16):
        ap.Equilibrium(ap.from_function(force))(torch.ones(2, 3), seen)
    assert seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_an_input_without_the_precision_for_a_nudge_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ap.ConfigError, match=f"given {dtype}.*keep the block in float32"):
        damped().block()(torch.ones(1, 2, 8).to(dtype))


def test_parameters_swapped_in_for_one_call_are_refused_in_the_backward_pass() -> None:
    this = damped()
    block = this.block(ap.AEP())
    own = {k: p.detach() * 0.5 for k, p in block.named_parameters()}
    leaf = this.x.clone().requires_grad_()
    z = torch.func.functional_call(block, own, (leaf,))
    with pytest.raises(ap.RuleError, match="not those of the forward pass"):
        z.sum().backward()


def test_a_second_derivative_is_refused_with_a_reason() -> None:
    this = gated()
    block = this.block(ap.AEP())
    leaf = this.x.clone().requires_grad_()
    weight = torch.ones((), dtype=leaf.dtype, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (first,) = torch.autograd.grad((weight * block(leaf)).sum(), leaf, create_graph=True)
        for source in (leaf, weight, block.dynamics.alpha):
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                torch.autograd.grad(first.square().sum(), source, retain_graph=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dynamics": ap.GatedBlock}, "the class GatedBlock, .*GatedBlock\\(128, head"),
        ({"dynamics": torch.nn.Linear(2, 2)}, "Linear .*expected an AbstractDynamics"),
        ({"solver": ap.Anderson}, "the class Anderson, .*write solver=Anderson\\(\\)"),
        ({"solver": "anderson"}, "str 'anderson', expected an AbstractSolver"),
        ({"estimator": ap.AEP}, "the class AEP, .*write estimator=AEP\\(\\)"),
        ({"estimator": "AEP"}, "str 'AEP', expected an AbstractEstimator"),
        ({"on_failure": "ignore"}, "'ignore', expected 'raise', 'warn' or 'accept'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_to_write(wrong: dict[str, Any], message: str) -> None:
    right = {"dynamics": ap.GatedBlock(8, heads=2)}
    (name,) = wrong
    with pytest.raises(ap.ConfigError, match=f"{name} is {message}"):
        ap.Equilibrium(**{**right, **wrong})
    if name != "dynamics":
        block = ap.Equilibrium(**right)
        with pytest.raises(ap.ConfigError, match=f"{name} is"), ap.using(block, **wrong):
            raise AssertionError("never entered")
        assert block.on_failure == "raise"


def test_using_changes_every_equilibrium_for_a_while_and_no_longer() -> None:
    blocks = torch.nn.Sequential(*(damped(seed=i).block() for i in range(2)))
    assert [path for path, _ in ap.equilibria(blocks)] == ["0", "1"]
    before = [(b.estimator, b.solver, b.on_failure) for b in blocks]
    with pytest.raises(KeyError), ap.using(blocks, ap.EP(), ap.Euler(), "accept"):
        assert all(b.estimator == ap.EP() and b.solver == ap.Euler() for b in blocks)
        assert all(b.on_failure == "accept" for b in blocks)
        raise KeyError
    assert [(b.estimator, b.solver, b.on_failure) for b in blocks] == before


def test_bptt_needs_a_relaxation_that_it_can_record() -> None:
    this = damped()
    with pytest.raises(ap.RuleError, match="Anderson is none.*solver=Euler\\(step=0.1"):
        this.block(ap.BPTT())(this.x)


class Growing(ap.AbstractDynamics):
    """`F = z + x`: its only fixed point repels every relaxation."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(4))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z + x + self.bias


SLOW = ap.Euler(step=0.1, max_steps=20, tol=1e-6)


def test_a_phase_that_fails_raises_warns_or_is_accepted() -> None:
    this = damped(scale=0.5)

    def free(policy: str) -> ap.Certificate:
        block = ap.Equilibrium(Growing(), SLOW, on_failure=policy)
        block(torch.ones(2, 4))
        return block.certificate

    def back(policy: str) -> ap.Certificate:
        block = this.block(ap.Implicit(tol=1e-9, max_steps=2), on_failure=policy)
        this.cost(block(this.x)).backward()
        return block.certificate

    end = "the limit of steps was reached"
    for call, message in (
        (free, f"free phase: {end} .*worst residual .*tolerance 1e-06"),
        (back, f"adjoint: {end}"),
    ):
        with pytest.raises(ap.ConvergenceError, match=message):
            call("raise")
        with pytest.warns(RuntimeWarning, match=message):
            call("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet, loose = free("accept"), back("accept")
    assert quiet.result is loose.adjoint_result is ap.Result.MAX_STEPS  # which is said all the same
    assert float(loose.adjoint_residual.max()) > 1e-9


@pytest.mark.parametrize("estimator", [ap.AEP(), ap.BPTT()])
def test_a_state_that_is_lost_is_never_returned_silently(estimator: ap.AbstractEstimator) -> None:
    block = ap.Equilibrium(Growing(), ap.Euler(step=1e20, max_steps=20), estimator)
    with pytest.raises(ap.ConvergenceError, match="became infinite or NaN"):
        block(torch.ones(2, 4))


def test_the_limit_of_evaluations_is_that_of_the_call() -> None:
    this = damped(scale=0.5)
    needed = this.block(solver=ap.Anderson(tol=1e-8, max_steps=60))
    with torch.no_grad():
        needed(this.x)
        enough = needed.certificate.free_evaluations
        this.block(solver=ap.Anderson(tol=1e-8, max_steps=enough))(this.x)
        short = this.block(solver=ap.Anderson(tol=1e-8, max_steps=4), on_failure="accept")
        short(this.x)
    assert short.certificate.result is ap.Result.MAX_STEPS
    assert short.certificate.free_evaluations == 4 + 1  # the limit, and what is recorded


def test_a_copy_carries_no_measurements() -> None:
    this = damped()
    block = this.block()
    block(this.x).sum().backward()
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin.certificate is None
    assert set(block.state_dict()) == {f"dynamics.attention.W_{k}" for k in "QKVO"}
