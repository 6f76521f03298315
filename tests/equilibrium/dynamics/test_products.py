"""The products of any force: by forward mode, by a second backward pass, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import altprop as ap
from altprop.equilibrium.dynamics.products import AutogradLinearisation
from altprop.testing import check_dynamics
from systems import EXACT, TIGHT, error, flat, gradients, jacobian, randn

X, V = randn(3, 6), randn(3, 6, seed=1)
W = 0.4 * randn(6, 6, seed=2)


def plain(z: Tensor) -> Tensor:
    return X - z + torch.tanh(z @ W)


def kinked(z: Tensor) -> Tensor:
    return X - z + (z @ W).relu() * z.square().mean(1, keepdim=True)


def attending(z: Tensor) -> Tensor:
    h = z.view(3, 3, 2)
    return X - z + nnf.scaled_dot_product_attention(h, h @ W[:2, :2], h, is_causal=True).flatten(1)


def of_the_input_alone(z: Tensor) -> Tensor:
    return X.square()


BOTH = [plain, kinked, attending, of_the_input_alone]


@pytest.mark.parametrize("force", BOTH)
def test_a_second_backward_pass_gives_the_product_of_forward_mode(
    force: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    directions = (V, V, V[[1, 2, 0]])  # the first is looked at, the others come from its record
    products = AutogradLinearisation(force, X)
    wanted = [products.jvp(v) for v in directions]

    def refuse(self: AutogradLinearisation, v: Tensor) -> Tensor:
        raise RuntimeError("functorch cannot transform this")

    monkeypatch.setattr(AutogradLinearisation, "_jvp", refuse)
    for v, exact in zip(directions, wanted, strict=True):
        assert torch.allclose(products.jvp(v), exact, rtol=1e-12, atol=1e-14)


def test_fused_kernels_give_way_to_plain_ones_in_which_forward_mode_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer, z = nn.LSTM(3, 3, batch_first=True), torch.randn(2, 4, 3)  # fused in float32 alone
    force = lambda z: layer(z)[0] - z  # noqa: E731
    v = torch.randn_like(z)
    J = torch.autograd.functional.jacobian(force, z).reshape(24, 24)
    monkeypatch.delattr(AutogradLinearisation, "_turn")  # it is asked for no second backward pass
    pushed = AutogradLinearisation(force, z).jvp(v)
    assert torch.allclose(pushed.flatten(), J @ v.flatten(), rtol=1e-5, atol=1e-6)


def energy(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    return (z - x).square().sum() / 2 + 0.3 * nnf.softplus(z @ W).sum()


def downhill(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Return minus an energy's gradient as autograd gives it, which functorch cannot transform."""
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        return -torch.autograd.grad(energy(z, x, W), z, create_graph=True)[0]


def functional(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
    return -torch.func.grad(energy)(z, x, W)


class Tanh(torch.autograd.Function):
    """As it was written before `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def by_tanh(kind: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    return lambda z, x, W: x - z + kind.apply(z @ W)


OWN = {
    "energy": (downhill, functional),
    "function": (by_tanh(Tanh), lambda z, x, W: x - z + torch.tanh(z @ W)),
}


def cost(z: Tensor) -> Tensor:
    return (z.square() * V).sum()


def block(force: Callable[..., Tensor], estimator: ap.AbstractEstimator) -> ap.Equilibrium:
    return ap.Equilibrium(ap.from_function(force, W=nn.Parameter(W.clone())), TIGHT, estimator)


@pytest.mark.parametrize("name", OWN)
def test_a_force_that_forward_mode_refuses_has_the_products_and_gradients_of_one_it_takes(
    name: str,
) -> None:
    own, taken = (block(force, EXACT) for force in OWN[name])
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda z: own.dynamics(z, X), (X,), (V,))
    products, wanted = (one.dynamics.linearise(X, X) for one in (own, taken))
    for _ in range(2):
        assert torch.allclose(products.jvp(V), wanted.jvp(V), rtol=1e-12, atol=1e-14)
    J = jacobian(own.dynamics, X, X)
    assert torch.allclose(products.jvp(V).flatten(), J @ V.flatten(), rtol=1e-12, atol=1e-14)
    exact = flat(gradients(taken, X, cost))
    near = {"tol": 1e-9, "response": 1e-5}
    for estimator in (ap.AEP(**near), ap.AEP(linearise="tracking", **near), EXACT):
        assert error(flat(gradients(block(OWN[name][0], estimator), X, cost)), exact) < 1e-6
    check_dynamics(own.dynamics, X)


def test_a_newton_step_works_on_an_energy() -> None:
    force = ap.from_function(downhill, W=nn.Parameter(W.clone()))
    z = ap.Equilibrium(force, ap.NewtonKrylov(tol=1e-12))(X)
    assert torch.allclose(z, block(functional, EXACT)(X), rtol=1e-9)


class Once(Tanh):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Tanh.backward(ctx, g)


class Outside(Tanh):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - torch.from_numpy(x.numpy()).tanh() ** 2) + 0 * torch.from_numpy(g.numpy())


class Cut(Tanh):
    """What is right as it is computed, and recorded as half of that."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Tanh.backward(ctx, g / 2) + Tanh.backward(ctx, g.detach() / 2)


class Lost(Tanh):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Tanh.backward(ctx, g.detach())


@pytest.mark.parametrize("kind", [Once, Outside, Cut, Lost])
def test_without_a_second_derivative_it_is_refused_with_what_to_write(
    kind: type[torch.autograd.Function],
) -> None:
    force = by_tanh(kind)
    exact = flat(gradients(block(by_tanh(Tanh), EXACT), X, cost))
    assert error(flat(gradients(block(force, EXACT), X, cost)), exact) < 1e-9  # it needs none
    message = r"no forward-mode derivative \(.*setup_context.*write estimator=Implicit\(\)"
    with pytest.raises(ap.RuleError, match=message) as refused:
        gradients(block(force, ap.AEP()), X, cost)
    assert "\n" not in str(refused.value) and "functorch" in str(refused.value.__cause__)


class Mine(Tanh):
    broken = False

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if Mine.broken:
            raise RuntimeError("mine")
        return Tanh.backward(ctx, g)


@pytest.mark.parametrize("where", ["force", "backward"])
def test_an_error_of_the_users_own_is_raised_as_it_is(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = False

    def force(z: Tensor) -> Tensor:
        if broken:
            raise RuntimeError("mine")
        return X - z + (torch.tanh(z) if where == "force" else Mine.apply(z))

    products = AutogradLinearisation(force, X)
    if where == "force":
        broken = True
    else:
        monkeypatch.setattr(Mine, "broken", True)
    with pytest.raises(RuntimeError, match="^mine$"):
        products.jvp(V)


def test_memory_that_runs_out_is_no_refusal_of_forward_mode() -> None:
    calls = 0

    def force(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise torch.OutOfMemoryError("full")
        return X - z

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        AutogradLinearisation(force, X).jvp(V)
    assert calls == 2
