"""The contract of a dynamics, checked from outside.

Every check compares with an independent oracle (automatic differentiation, or the same computation
done alone) and raises an `AssertionError` that says which promise is broken and by how much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.products import AutogradLinearisation
from altprop.testing.contract import close, randn, require


def check_dynamics(dynamics: AbstractDynamics, x: Tensor) -> None:
    """Check that `dynamics` keeps the contract of `AbstractDynamics` at input `x`, `(B, ...)`.

    The force is deterministic and has the state's shape, `linearise` gives the products of
    automatic differentiation, and `record`, closed form or not, the force itself and the gradients
    of all parameters and of the input. In training and in evaluation mode samples do not interact
    and buffers stay as they are. Use parameters that are not at a special point (a gate of zero
    hides what is behind it) and `x` in float64, with `B ≥ 2`.

    **Raises:** `AssertionError`, naming the promise that is broken.
    """
    generator = torch.Generator().manual_seed(0)
    z, v, a = (randn(dynamics.start(x).shape, generator, x) for _ in range(3))
    _check_modes(dynamics, z, x, a)
    with torch.no_grad():
        force = dynamics(z, x)
        require(force.shape == z.shape, f"the force is {force.shape} at a state {z.shape}")
        require(torch.equal(force, dynamics(z, x)), "the force differs from call to call")
        for i in range(len(x)):
            alone = dynamics(z[i : i + 1], x[i : i + 1])
            close(alone, force[i : i + 1], 1e-10, f"the force on sample {i} depends on the others")
    exact, own = (
        AutogradLinearisation(lambda s: dynamics(s, x.detach()), z),
        dynamics.linearise(z, x),
    )
    for name, argument in (("jvp", v), ("vjp", a)):
        product = getattr(own, name)(argument)
        require(not product.requires_grad, f"linearise(...).{name} records for autograd")
        close(product, getattr(exact, name)(argument), 1e-10, f"linearise(...).{name} is wrong")
    _check_own(dynamics, z, x, a)
    _check_record(dynamics, z, x, a)
    require(
        math.isfinite(dynamics.step) and dynamics.step > 0,
        f"step is {dynamics.step}, expected a number > 0",
    )


def _check_own(dynamics: AbstractDynamics, z: Tensor, x: Tensor, a: Tensor) -> None:
    """Check the blocks on the Jacobian's diagonal, and that a token hears no later one."""
    products = dynamics.linearise(z, x)
    if not products.tells_tokens:
        return
    found = products.own_vjp(a)
    exact = AutogradLinearisation(lambda s: dynamics(s, x.detach()), z)
    for t in range(z.shape[1]):
        alone = torch.zeros_like(a)
        alone[:, t] = a[:, t]
        pulled = exact.vjp(alone)
        close(found[:, t], pulled[:, t], 1e-10, f"linearise(...).own_vjp is wrong at token {t}")
        require(not bool(pulled[:, t + 1 :].any()), f"token {t} depends on later ones")


def _check_modes(dynamics: AbstractDynamics, z: Tensor, x: Tensor, a: Tensor) -> None:
    """Check in both modes that samples do not interact and that no buffer changes.

    **Arguments:** `a`, a cotangent of the force, `(B, ...)`.
    """
    modes = {m: m.training for m in dynamics.modules()}
    buffers = {name: b.detach().clone() for name, b in dynamics.named_buffers()}
    try:
        for mode in (False, True):
            dynamics.train(mode)
            where = f"in {'training' if mode else 'evaluation'} mode"
            with torch.random.fork_rng(devices=[]):
                leaf = z.detach().clone().requires_grad_()
                force = dynamics(leaf, x.detach())
            for name, b in dynamics.named_buffers():
                still = torch.equal(b, buffers[name])
                require(still, f"{where} an evaluation of the force changes the buffer {name}")
            for i in range(len(z) if force.requires_grad else 0):
                alone = torch.zeros_like(a)
                alone[i] = a[i]
                (pulled,) = torch.autograd.grad(force, leaf, alone, retain_graph=True)
                others = [j for j in range(len(z)) if j != i and bool(pulled[j].any())]
                text = f"{where} the force on sample {i} depends on the others, of {others}"
                require(not others, text)
    finally:
        for m, training in modes.items():
            m.training = training
        with torch.no_grad():
            for name, b in dynamics.named_buffers():
                b.copy_(buffers[name])


def _check_record(dynamics: AbstractDynamics, z: Tensor, x: Tensor, a: Tensor) -> None:
    """Check the recorded force at `z` and, for the cotangent `a`, its gradients."""
    leaf = x.detach().clone().requires_grad_()
    learned = {"x": leaf, **{n: p for n, p in dynamics.named_parameters() if p.requires_grad}}
    found, wanted = dynamics.record(z, leaf)[0], dynamics(z, leaf)
    close(found.detach(), wanted.detach(), 1e-10, "record(...) is not the force")
    for force in (found, wanted):
        require(force.requires_grad, "the force is not differentiable by the input")
    gradients = [
        torch.autograd.grad(force, list(learned.values()), a, allow_unused=True)
        for force in (found, wanted)
    ]
    for name, own, exact in zip(learned, *gradients, strict=True):
        require((own is None) == (exact is None), f"record(...) loses the gradient of {name}")
        if own is not None and exact is not None:
            close(own, exact, 1e-10, f"record(...) gives {name} a wrong gradient")
