"""One evaluation in closed form is the force, its linearisation and autograd's record of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from instances import System, system
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap
from altprop.equilibrium.dynamics import linearised
from altprop.equilibrium.dynamics.products import AbstractEvaluation, AbstractLinearisation

KINDS = ["damped", "gated", "thick", "thick rms", "thick gains"]


def instance(kind: str, tokens: int = 3) -> System:
    if kind != "thick gains":
        return system(kind, seed=1, tokens=tokens)
    torch.manual_seed(1)
    dynamics = ap.ThickBlock(4, 2, scale=0.4, damping=0.5, channel_gain=True, init_std=0.3)
    nn.init.normal_(dynamics.scale, 0.4, 0.1)
    x = torch.randn(2, tokens, 4, dtype=torch.float64)
    return System(dynamics.double(), x, torch.randn_like(x))


@pytest.fixture(params=[True, False], ids=["short window", "long window"])
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if not request.param:
        monkeypatch.setattr(linearised, "_DENSE", 2)  # three tokens are a long window then
        monkeypatch.setattr(linearised, "_LEAST", 1)
    yield request.param


def recorded(s: System) -> tuple[Callable[[], AbstractLinearisation], Tensor, Tensor]:
    z = s.x + 0.1
    force, linearise = s.dynamics.under(s.x).record(z)
    return linearise, z, force


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("dense")
def test_gradients_of_the_record_are_those_of_autograd(kind: str) -> None:
    s = instance(kind)
    s.x.requires_grad_()
    _, z, force = recorded(s)
    assert type(force.grad_fn).__name__ == "_AssignPullBackward"
    wanted = s.dynamics(z.detach(), s.x)
    assert torch.allclose(force, wanted, rtol=1e-12, atol=1e-13)
    a = torch.randn_like(z)
    names = ["x", *(name for name, _ in s.dynamics.named_parameters())]
    found = torch.autograd.grad(force, s.places(), a)
    exact = torch.autograd.grad(wanted, s.places(), a)
    for name, own, reference in zip(names, found, exact, strict=True):
        assert own.shape == reference.shape, name
        assert (own - reference).norm() <= 1e-12 * reference.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_learn_gets_no_gradient(kind: str) -> None:
    s = instance(kind)
    parameters = dict(s.dynamics.named_parameters())
    exact = dict(
        zip(
            parameters,
            torch.autograd.grad(
                s.dynamics(s.x + 0.1, s.x).sum(), list(parameters.values()), retain_graph=True
            ),
            strict=True,
        )
    )
    for learns in parameters:
        for name, p in parameters.items():
            p.requires_grad_(name == learns)
            p.grad = None
        recorded(s)[2].sum().backward()
        for name, p in parameters.items():
            assert (p.grad is None) == (name != learns), (name, learns)
        own = parameters[learns].grad
        assert own is not None
        assert (own - exact[learns]).norm() <= 1e-12 * exact[learns].norm(), learns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("dense")
def test_it_is_the_linearisation_that_is_made_alone(kind: str) -> None:
    s = instance(kind)
    linearise, z, _force = recorded(s)
    shared, alone = linearise(), s.dynamics.linearise(z, s.x)
    v = torch.randn_like(z)
    assert torch.allclose(shared.vjp(v), alone.vjp(v), rtol=1e-12, atol=1e-14)
    assert torch.allclose(shared.jvp(v), alone.jvp(v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_is_evaluated_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = instance(kind)
    made, evaluate = [], type(s.dynamics).evaluate
    monkeypatch.setattr(
        type(s.dynamics), "evaluate", lambda *a: made.append(0) or evaluate(*a), raising=True
    )
    linearise, _, force = recorded(s)
    linearise()
    force.sum().backward()
    assert len(made) == 1


def followed(s: System, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[AbstractEvaluation]]:
    """Return where references to all evaluations of the dynamics are put as they are made."""
    seen: list[weakref.ref[AbstractEvaluation]] = []
    evaluate = type(s.dynamics).evaluate

    def follow(*args: object) -> AbstractEvaluation:
        made = evaluate(*args)  # type: ignore[arg-type]
        assert made is not None
        seen.append(weakref.ref(made))
        return made

    monkeypatch.setattr(type(s.dynamics), "evaluate", follow)
    return seen


@pytest.mark.parametrize("retain", [False, True])
def test_an_evaluation_lives_as_long_as_what_autograd_saves(
    retain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = system("gated", seed=1)
    seen = followed(s, monkeypatch)
    gc.disable()  # it must not take the collector of cycles
    try:
        z = ap.Equilibrium(s.dynamics)(s.x)
        assert [r() is None for r in seen] == [False]
        loss = s.cost(z)
        loss.backward(retain_graph=retain)
        assert all((r() is None) != retain for r in seen)
        if retain:
            first = [p.grad.clone() for p in s.dynamics.parameters()]
            loss.backward()
            assert all(r() is None for r in seen)
            for p, once in zip(s.dynamics.parameters(), first, strict=True):
                assert torch.allclose(p.grad, 2 * once, rtol=1e-10)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        z = ap.Equilibrium(s.dynamics)(s.x)
        del z  # never differentiated
        assert all(r() is None for r in seen)
    finally:
        gc.enable()


def test_a_checkpoint_keeps_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    s = system("gated", seed=1)
    block = ap.Equilibrium(s.dynamics, estimator=ap.Implicit(tol=1e-10))
    s.cost(block(s.x)).backward()
    wanted = [p.grad.clone() for p in s.dynamics.parameters()]
    s.dynamics.zero_grad()
    seen = followed(s, monkeypatch)
    z = checkpoint(block, s.x, use_reentrant=False)
    assert [r() for r in seen] == [None]
    s.cost(z).backward()
    for p, own in zip(s.dynamics.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, own, rtol=1e-8)


def test_saved_tensors_that_are_copied_give_the_same_gradient() -> None:
    s = system("gated", seed=1)
    block = ap.Equilibrium(s.dynamics)
    s.cost(block(s.x)).backward()
    wanted = [p.grad.clone() for p in s.dynamics.parameters()]
    s.dynamics.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = s.cost(block(s.x))
    loss.backward()
    for p, own in zip(s.dynamics.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, own, rtol=1e-10)


def test_weights_changed_before_the_backward_pass_are_refused() -> None:
    s = system("gated", seed=1)
    loss = s.cost(ap.Equilibrium(s.dynamics)(s.x))
    with torch.no_grad():
        s.dynamics.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_hook_sees_the_call_that_is_recorded() -> None:
    """So weights that a hook makes, as `torch.nn.utils.weight_norm` does, are recorded too."""
    s = system("gated", seed=1)
    calls = []
    s.dynamics.up.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    recorded(s)
    assert calls == [True]
