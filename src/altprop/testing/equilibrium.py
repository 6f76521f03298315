"""The contract of an estimator, checked from outside.

Every check compares with an independent oracle (a closed form, automatic differentiation, finite
differences in float64, or the same computation done alone) and raises an `AssertionError` that
says which promise is broken and by how much. Everything is seeded; the global generator is left
as it was found.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from altprop.equilibrium.dynamics.damped import DampedAttention
from altprop.equilibrium.dynamics.gated import GatedBlock
from altprop.equilibrium.estimators.estimator import (
    AbstractAdjointEstimator,
    AbstractEstimator,
)
from altprop.equilibrium.estimators.implicit import Implicit
from altprop.equilibrium.estimators.problem import Cost
from altprop.equilibrium.module import Equilibrium
from altprop.equilibrium.solvers.anderson import Anderson
from altprop.equilibrium.solvers.solver import AbstractSolver, Result, with_limits
from altprop.testing.contract import check_value, close, randn, require
from altprop.testing.solving import check_solver as check_solver

Gradients = dict[str, Tensor]


def check_estimator(
    estimator: AbstractEstimator,
    exact: bool,
    *,
    solver: AbstractSolver | None = None,
    rtol: float = 2e-3,
) -> None:
    """Check that `estimator` keeps the contract of `AbstractEstimator`.

    On small attention systems (damped, and gated with an open gate) in float64, whose reference is
    implicit differentiation to 1e-11, itself checked against finite differences. The module is
    called with `cost=`, so that estimators which nudge with the cost can be checked too.

    **Arguments:** `exact`, whether the gradient is that of the loss to a relative error of `rtol`
    for every parameter and the input (else it only has to be finite); `solver`, of the free phase
    (default: `Anderson` to 1e-11).

    **Raises:** `AssertionError`, naming the promise that is broken.
    """
    check_value(estimator)
    cases = list(_cases(estimator, solver or Anderson(tol=1e-11, max_steps=500)))
    for case in cases:
        _check_gradient(case, exact, rtol)
        _check_autograd(case)
        _check_samples(case)
        _check_checkpointing(case)
        _check_module(case)
        _check_double_backward(case)
        _check_precision(case)
    _check_compiled(cases[0])


@dataclass(frozen=True)
class _Case:
    """A small equilibrium with an input and a cost whose gradient is not constant."""

    block: Equilibrium
    x: Tensor
    cost: Cost

    def leaf(self) -> Tensor:
        return self.x.clone().requires_grad_()

    def loss(self, x: Tensor) -> Tensor:
        return self.cost(self.block(x, cost=self.cost))

    def gradients(self, scale: float = 1.0) -> Gradients:
        """Return what one backward pass of `scale` times the loss writes."""
        self.block.zero_grad()
        leaf = self.leaf()
        (scale * self.loss(leaf)).backward()
        return _collect(self.block, leaf)


def _collect(block: nn.Module, leaf: Tensor) -> Gradients:
    """Return the gradients of the parameters and of the input `x`, all of which must be there."""
    out = {}
    for name, p in {"x": leaf, **dict(block.named_parameters())}.items():
        if p.requires_grad:
            if p.grad is None:
                raise AssertionError(f"{name} gets no gradient")
            require(bool(p.grad.isfinite().all()), f"the gradient of {name} is not finite")
            out[name] = p.grad.clone()
    return out


def _cases(estimator: AbstractEstimator, solver: AbstractSolver) -> Iterator[_Case]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        gated = GatedBlock(8, heads=2, expansion=2, init_std=0.3)
        nn.init.uniform_(gated.alpha, -0.4, 0.4)
        nn.init.normal_(gated.norm1.weight, 1, 0.2)
        nn.init.normal_(gated.up.bias, 0, 0.2)
        systems = [DampedAttention(8, heads=2, scale=0.7), gated]
        x, read, weight = torch.randn(2, 5, 8), torch.randn(8, 8) / 3, torch.randn(2, 5, 8)

    def cost(z: Tensor) -> Tensor:
        return (weight.to(z) * torch.tanh(z @ read.to(z))).sum()

    for system in systems:
        yield _Case(Equilibrium(system.double(), solver, estimator), x.double(), cost)


def _same(got: Gradients, wanted: Gradients, rtol: float, text: str) -> None:
    for name, gradient in wanted.items():
        close(got[name], gradient, rtol, f"{text} ({name})")


def _check_gradient(case: _Case, exact: bool, rtol: float) -> None:
    got = case.gradients()
    seen = case.block.certificate
    if seen is None:
        raise AssertionError("a call leaves no certificate")
    require(bool(seen.result), f"the free phase ends with {seen.result.name}")
    require(seen.free_residual.shape == case.x.shape[:1], "free_residual must be (B,)")
    if _has_adjoint(case.block):
        for name in ("adjoint_result", "adjoint_remainder"):
            require(getattr(seen, name) is not None, f"the certificate has no {name}")
        # what solves nothing, a truncated series say, has nothing that could fail to converge
        measured = seen.adjoint_residual is not None
        require(
            measured or seen.adjoint_result is Result.FIXED_TIME,
            "the certificate has no adjoint_residual",
        )
    solves = not _has_adjoint(case.block) or seen.adjoint_residual is not None
    require(seen.adjoint_evaluations > 0 or not solves, "the backward pass reports no evaluations")
    if not exact:
        return
    dynamics = case.block.dynamics
    tight = Anderson(tol=1e-12, max_steps=500)
    oracle = replace(case, block=Equilibrium(dynamics, tight, Implicit(tol=1e-11, max_steps=500)))
    wanted = oracle.gradients()
    _check_finite_differences(oracle, wanted)
    _same(got, wanted, rtol, f"on {type(dynamics).__name__} the gradient is not the loss's")


def _check_finite_differences(oracle: _Case, wanted: Gradients) -> None:
    """Check the reference along one random direction of each parameter and of the input."""
    generator = torch.Generator().manual_seed(6)
    x, step = oracle.x.clone(), 1e-5
    with torch.no_grad():
        for name, p in {"x": x, **dict(oracle.block.named_parameters())}.items():
            direction = randn(p.shape, generator, p)
            direction /= direction.norm()
            ends = []
            for move in (step, -2 * step):
                p += move * direction
                ends.append(oracle.loss(x))
            p += step * direction
            slope, predicted = (ends[0] - ends[1]) / (2 * step), (wanted[name] * direction).sum()
            require(
                bool((slope - predicted).abs() <= 1e-6 * wanted[name].norm()),
                f"finite differences deny the reference for {name}: {slope} against {predicted}",
            )


def _check_autograd(case: _Case) -> None:
    """Check what autograd promises of any operation."""
    block, once = case.block, case.gradients()
    with torch.no_grad():
        quiet = block(case.x, cost=case.cost)
    loud = block(case.x, cost=case.cost)
    require(loud.requires_grad, "the equilibrium is not differentiable")
    require(torch.equal(quiet, loud), "the value differs under no_grad")

    def after(*inputs: Tensor) -> Gradients:
        """Return what one backward pass through as many uses writes, `x` for the last."""
        block.zero_grad()
        torch.stack([case.loss(x) for x in inputs]).sum().backward()
        return _collect(block, inputs[-1])

    first, other = case.leaf(), case.x.flip(1).clone().requires_grad_()
    both, second = after(first, other), after(other.detach().clone().requires_grad_())
    summed = {k: second[k] if k == "x" else once[k] + second[k] for k in once}
    _same(both, summed, 1e-9, "two uses in one graph do not add up")

    block.zero_grad()
    leaf = case.leaf()
    for _ in range(2):
        case.loss(leaf).backward()
    twice = {k: g / 2 for k, g in _collect(block, leaf).items()}
    _same(twice, once, 1e-9, "two backward passes do not accumulate")

    block.zero_grad()
    torch.autograd.grad(case.loss(leaf), leaf)
    touched = [name for name, p in block.named_parameters() if p.grad is not None]
    require(not touched, f"torch.autograd.grad with respect to x writes .grad of {touched}")

    # powers of two, so that the cotangent of unit norm is the same to the last bit: a solver that
    # differences the force magnifies what rounding another factor would leave
    for scale in (2.0**14, 2.0**-20):
        scaled = {k: g / scale for k, g in case.gradients(scale).items()}
        _same(scaled, once, 1e-9, f"the gradient of {scale:g} times the loss is not that multiple")
    for name, gradient in case.gradients(0.0).items():
        require(not bool(gradient.any()), f"a zero cotangent gives {name} a gradient")

    name, frozen = next(iter(block.named_parameters()))
    frozen.requires_grad_(False)
    rest = case.gradients()
    require(frozen.grad is None, f"the frozen {name} gets a gradient")
    require(rest.keys() == once.keys() - {name}, f"freezing {name} takes others their gradient")
    _same({**once, **rest}, once, 1e-9, f"freezing {name} changes other gradients")
    frozen.requires_grad_(True)


def _check_samples(case: _Case) -> None:
    """Check that a sample which does not count in the loss gets no gradient, and disturbs none."""
    whole, alone = case.leaf(), case.x[:1].clone().requires_grad_()

    def cost(z: Tensor) -> Tensor:
        return z[0].square().sum()

    for leaf in (whole, alone):
        cost(case.block(leaf, cost=cost)).backward()
    if whole.grad is None or alone.grad is None:
        raise AssertionError("the input gets no gradient")
    own, others = whole.grad[:1], whole.grad[1:]
    # (what the free phase left moves all samples a little in a phase of fixed length)
    require(
        float(others.norm()) <= 1e-8 * float(own.norm()),
        "a sample outside the loss gets a gradient",
    )
    close(own, alone.grad, 1e-8, "a batch-mate changes a sample's gradient")


def _check_checkpointing(case: _Case) -> None:
    def body(x: Tensor) -> Tensor:
        return torch.sin(case.block(x, cost=lambda z: case.cost(torch.sin(z))))

    results = []
    for recompute in (False, True):
        case.block.zero_grad()
        leaf = case.leaf()
        out = checkpoint(body, leaf, use_reentrant=False) if recompute else body(leaf)
        case.cost(out).backward()
        results.append(_collect(case.block, leaf))
        seen = case.block.certificate
        filled = seen is not None and (seen.adjoint_evaluations > 0 or bool(seen.adjoint_result))
        require(filled, "the certificate is not filled under activation checkpointing")
    _same(results[1], results[0], 1e-9, "activation checkpointing changes the gradient")


def _check_module(case: _Case) -> None:
    """Check that the module around the estimator copies, pickles and loads."""
    once = case.gradients()
    fresh = copy.deepcopy(case.block)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(case.block.state_dict())
    twins = {
        "deepcopy": copy.deepcopy(case.block),
        "pickle": pickle.loads(pickle.dumps(case.block)),
        "load_state_dict": fresh,
    }
    for how, twin in twins.items():
        require(twin.estimator == case.block.estimator, f"{how} loses the estimator")
        _same(replace(case, block=twin).gradients(), once, 1e-12, f"{how} changes the gradient")


def _has_adjoint(block: Equilibrium) -> bool:
    """Return whether the estimator produces an adjoint, instead of recording what it does."""
    return isinstance(block.estimator, AbstractAdjointEstimator)


def _check_double_backward(case: _Case) -> None:
    """Check that nobody gets a wrong second derivative; a recorded relaxation has a right one."""
    if not _has_adjoint(case.block):
        return

    def linear(z: Tensor) -> Tensor:  # its cotangent is constant
        return z.sum()

    for cost in (linear, case.cost):
        leaf = case.leaf()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels refuse for a reason of their own
            z = case.block(leaf, cost=cost)
            (first,) = torch.autograd.grad(cost(z), leaf, create_graph=True)
            try:
                torch.autograd.grad(first.square().sum(), leaf)
            except RuntimeError:
                continue
        raise AssertionError("double backward gives a second derivative, which cannot be right")


def _check_precision(case: _Case) -> None:
    """Check that nothing inside is computed in bf16, whatever autocast says outside."""
    block = copy.deepcopy(case.block).float()
    if block.solver.tol > 0:
        block.solver = with_limits(block.solver, 1e-5, block.solver.max_steps)
    results = []
    for on in (False, True):
        block.zero_grad()
        leaf = case.x.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            z = block(leaf, cost=case.cost)
        require(z.dtype == torch.float32, f"under bf16 autocast the state is {z.dtype}")
        case.cost(z).backward()
        results.append(_collect(block, leaf))
    _same(results[1], results[0], 1e-6, "bf16 autocast changes the gradient")


def _check_compiled(case: _Case) -> None:
    once = case.gradients()
    case.block.zero_grad()
    leaf = case.leaf()
    with _compiler():
        value = torch.compile(case.block, backend="aot_eager")(leaf, cost=case.cost)
        case.cost(value).backward()
    _same(_collect(case.block, leaf), once, 1e-9, "torch.compile changes the gradient")
    with torch.no_grad():
        close(value, case.block(case.x, cost=case.cost), 1e-12, "torch.compile changes the value")


@contextmanager
def _compiler() -> Iterator[None]:
    """Compile from a clean slate, and leave one."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        # the compiler looks at .grad of tensors between two graphs, and hides its own warning
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        yield
    torch.compiler.reset()
