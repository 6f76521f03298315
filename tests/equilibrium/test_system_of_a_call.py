"""What evaluates a force after a call, a hinge or a spectrum, evaluates the system of that call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from systems import EXACT, TIGHT, system

HINGE = ap.JacobianHinge(target=1e-3, every=1)


def measured(block: ap.Equilibrium) -> tuple[float, list[Tensor]]:
    """Return the gain after a fresh start, and the gradients that the hinge alone writes."""
    block.zero_grad()
    gain = HINGE.apply(block, HINGE.init(torch.Generator().manual_seed(0)), 0)["jacobian_gain"]
    return gain, [p.grad.clone() for p in block.parameters()]


def same(block: ap.Equilibrium, other: ap.Equilibrium) -> None:
    (gain, gradients), (wanted, exact) = measured(block), measured(other)
    assert gain == pytest.approx(wanted, rel=1e-9) and gain > 0.05
    for own, reference in zip(gradients, exact, strict=True):
        assert torch.allclose(own, reference, rtol=1e-7, atol=1e-12) and reference.any()


def weight() -> nn.Linear:
    return nn.Linear(6, 6, bias=False).double()


def with_gain(z: Tensor, x: Tensor, W: Tensor, gain: float = 0.0) -> Tensor:
    return x - z + gain * torch.tanh(z @ W)


def with_mask(z: Tensor, x: Tensor, mask: Tensor, W: Tensor) -> Tensor:
    return x - z + mask * torch.tanh(z @ W) / 2


X = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([1.0, 0, 1, 1, 0, 2], dtype=torch.float64)


def pair(force: Callable[..., Tensor], fixed: Callable[..., Tensor]) -> list[ap.Equilibrium]:
    """Return two blocks with one weight: by the force itself, and by what the call makes of it."""
    W = nn.Parameter(0.4 * torch.randn(6, 6, dtype=torch.float64))
    return [ap.Equilibrium(ap.from_function(f, W=W), TIGHT, EXACT) for f in (force, fixed)]


def test_the_hinge_measures_the_further_arguments_of_the_call() -> None:
    block, fixed = pair(with_mask, lambda z, x, W: with_mask(z, x, MASK, W))
    block(X, MASK).sum().backward()
    fixed(X).sum().backward()
    same(block, fixed)
    block, fixed = pair(with_gain, lambda z, x, W: with_gain(z, x, W, gain=0.9))
    block(X, gain=0.9).sum().backward()
    fixed(X).sum().backward()
    same(block, fixed)
    block(X).sum().backward()  # and of the last one
    assert HINGE.apply(block, HINGE.init(torch.Generator()), 0)["jacobian_gain"] < 1e-5


class Dropped(nn.Module):
    """A force with dropout that remembers the masks it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.drop = weight(), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        mask = self.drop(torch.ones_like(z))
        if self.drop.training:
            self.masks.append(mask)
        return x - z + mask * torch.tanh(self.W(z)) / 2


def test_the_hinge_measures_with_the_draws_of_the_call_and_draws_nothing_itself() -> None:
    force = Dropped()
    block = ap.Equilibrium(ap.from_function(force), TIGHT, EXACT)
    block(X).sum().backward()
    mask = force.masks[0]
    by_mask = lambda z, x: x - z + mask * torch.tanh(force.W(z)) / 2  # noqa: E731
    fixed = ap.Equilibrium(ap.from_function(by_mask, force.W), TIGHT, EXACT)
    fixed(X).sum().backward()
    drawn = torch.get_rng_state()
    same(block, fixed)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(other, mask) for other in force.masks)


def test_spectra_are_those_of_the_call() -> None:
    block, fixed = pair(with_mask, lambda z, x, W: with_mask(z, x, MASK, W))
    block(X, MASK).sum().backward()
    z = fixed(X).detach()
    found, wanted = ap.spectrum(block.certificate), ap.spectrum(fixed.dynamics, z, X)
    for name in ("abscissa", "radius", "step_limit"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name))
    numerical = ap.numerical_abscissa(fixed.dynamics, z, X)
    assert torch.allclose(ap.numerical_abscissa(block.certificate), numerical)
    s = system("gated", seed=1)
    block = s.block()
    z = block(s.x).detach()
    tokens = ap.token_spectrum(s.dynamics, z, s.x).abscissa
    assert torch.allclose(ap.token_spectrum(block.certificate).abscissa, tokens, rtol=1e-7)


def test_the_spectrum_of_a_force_with_dropout_has_one_mask() -> None:
    force = Dropped()
    found = ap.spectrum(ap.from_function(force), X, X)
    assert all(torch.equal(mask, force.masks[0]) for mask in force.masks)
    whole = torch.autograd.functional.jacobian(
        lambda z: -z + force.masks[0] * torch.tanh(force.W(z)) / 2, X
    )
    for i in range(2):
        values = torch.linalg.eigvals(whole[i, :, i])
        assert torch.allclose(values.real.amax(), found.abscissa[i])


def test_a_stack_is_measured_under_its_further_arguments() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = weight()

        def forward(self, h: Tensor, gain: float = 1.0) -> Tensor:
            return gain * torch.tanh(self.W(h))

    block = ap.Equilibrium(ap.Layered([Scaled() for _ in range(3)]))
    seen = []
    for gain in (0.0, 1.0, 2.0):
        block(X.requires_grad_(), gain=gain)
        seen.append(ap.numerical_abscissa(block.certificate))
    assert torch.allclose(seen[0], torch.full_like(seen[0], -1.0))
    assert bool((seen[1] > seen[0] + 0.05).all() and (seen[2] > seen[1]).all())
    block(X)
    plain = ap.numerical_abscissa(block.dynamics, block.certificate.state, X)
    assert torch.allclose(ap.numerical_abscissa(block.certificate), plain)


def test_what_does_not_fit_is_refused() -> None:
    s = system("damped", seed=1)
    block, masked = ap.Equilibrium(s.dynamics), pair(with_mask, with_mask)[0]
    z = block(s.x)
    with pytest.raises(ap.ConfigError, match="a state and an input of its own"):
        ap.spectrum(block.certificate, z, s.x)
    with pytest.raises(ap.ConfigError, match=r"without z and x: write spectrum\(dynamics, z, x\)"):
        ap.numerical_abscissa(s.dynamics)
    masked(torch.randn(2, 3, 6, dtype=torch.float64), MASK)
    with pytest.raises(ap.RuleError, match="under its input alone, not with further arguments"):
        ap.token_spectrum(masked.certificate)
    block.extend(s.x)
    assert HINGE.apply(block, HINGE.init(torch.Generator()), 0) == {}  # of no whole window
    with pytest.raises(ap.ConfigError, match="call the block on a window"):
        ap.spectrum(block.certificate)


class Token:
    """Something that lives as long as a graph."""


class Traced(torch.autograd.Function):
    """The identity, whose node in the graph holds a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: list[Any]) -> Tensor:
        ctx.token = Token()
        tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def tensors(thing: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Return all tensors that can be reached from an object's attributes, modules left out."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, nn.Module):
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    inside = thing.values() if isinstance(thing, dict) else getattr(thing, "__dict__", {}).values()
    inside = thing if isinstance(thing, list | tuple) else inside
    return [t for one in inside for t in tensors(one, seen)]


@pytest.mark.parametrize("kind", ["damped", "own", "stack"])
def test_a_certificate_keeps_nothing_of_autograd(kind: str) -> None:
    scale = torch.ones(6, dtype=torch.float64, requires_grad=True)
    graph: list[Any] = []
    x, mask = (Traced.apply(t, graph) for t in (X.clone().requires_grad_(), scale))
    further: tuple[Any, ...] = ()
    if kind == "damped":
        block = ap.Equilibrium(ap.DampedAttention(6, 2).double(), TIGHT, EXACT)
        x = x.unsqueeze(1)
    elif kind == "own":
        block, further = pair(with_mask, with_mask)[0], (mask,)
    else:

        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.W = weight()

            def forward(self, h: Tensor, given: dict[str, Tensor]) -> Tensor:
                return given["mask"] * torch.tanh(self.W(h))

        block, further = ap.Equilibrium(ap.Layered([Masked(), Masked()])), ({"mask": mask},)
    z = block(x, *further)
    kept = tensors(block.certificate)
    assert len(kept) >= 4 and not any(t.requires_grad for t in kept)
    before = len(kept)
    z.sum().backward()
    assert not any(t.requires_grad for t in tensors(block.certificate))
    assert len(tensors(block.certificate)) >= before
    del x, mask, z, kept, further
    gc.collect()
    assert len(graph) == 2 and all(token() is None for token in graph)
