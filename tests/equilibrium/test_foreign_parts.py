"""A dynamics whose parts compute something else has another force, and every gradient is its own.

The oracle differentiates the relaxation step by step, and so knows nothing of closed forms.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from instances import system
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import altprop as ap
from altprop.equilibrium.dynamics.attention import CausalAttention

EXACT = [ap.AEP(beta=1e-4, tol=1e-9), ap.Implicit(tol=1e-10)]


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.7 * weight


class Quieter(CausalAttention):
    """Attention with a force of its own, which has no closed form."""

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 * super().forward(z)


class Adapted(nn.Module):
    """A map of low rank beside a linear layer, whose weight and bias it shows as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.3 * torch.randn(1, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(0.3 * torch.randn(base.out_features, 1, dtype=base.weight.dtype))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.mT @ self.b.mT


def attention(d: ap.AbstractDynamics) -> CausalAttention:
    found = d.attention
    assert isinstance(found, CausalAttention)
    return found


def quieter(d: ap.AbstractDynamics) -> None:
    other = Quieter(4, 2, 0.25).double()
    other.load_state_dict(attention(d).state_dict())
    d.attention = other


def adapted(d: ap.AbstractDynamics) -> None:
    d.up = Adapted(d.up)  # type: ignore[arg-type]


def without_bias(d: ap.AbstractDynamics) -> None:
    d.up = nn.Linear(4, 8, bias=False).double()


def on_the_instance(d: ap.AbstractDynamics) -> None:
    inner = d.attention.forward
    d.attention.forward = lambda z: 0.5 * inner(z)


def combined_on_the_instance(d: ap.AbstractDynamics) -> None:
    assert isinstance(d, ap.GatedBlock)
    inner = d.combine
    d.combine = lambda z, x, mixed: inner(z, x, 0.5 * mixed)  # type: ignore[method-assign]


def hooked(d: ap.AbstractDynamics) -> None:
    attention(d).register_forward_hook(lambda m, args, out: 0.5 * out)


def louder_weights(d: ap.AbstractDynamics) -> None:
    parametrizations.weight_norm(d.up)  # type: ignore[arg-type]


def scaled_projection(d: ap.AbstractDynamics) -> None:
    parametrize.register_parametrization(attention(d), "W_V", Scaled())


def scaled_gate(d: ap.AbstractDynamics) -> None:
    parametrize.register_parametrization(d, "alpha", Scaled())


CHANGES: list[Callable[[ap.AbstractDynamics], None]] = [
    quieter,
    adapted,
    without_bias,
    on_the_instance,
    combined_on_the_instance,
    louder_weights,
    scaled_projection,
    scaled_gate,
]


def gradients(
    dynamics: ap.AbstractDynamics, x: Tensor, estimator: ap.AbstractEstimator, solver: object
) -> dict[str, Tensor]:
    """Return the gradients by name, and the state under the name of nothing."""
    block = ap.Equilibrium(dynamics, solver, estimator)  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_()
    z = block(leaf)
    places = {"x": leaf, **dict(dynamics.named_parameters())}
    found = torch.autograd.grad((z + torch.sin(2 * z)).sum(), list(places.values()))
    with torch.no_grad():
        assert torch.equal(block(x), z)
    return {"": z.detach(), **dict(zip(places, found, strict=True))}


def compare(dynamics: ap.AbstractDynamics, x: Tensor, estimator: ap.AbstractEstimator) -> None:
    wanted = gradients(dynamics, x, ap.BPTT(), ap.Euler(step=0.5, max_steps=120))
    found = gradients(dynamics, x, estimator, ap.Anderson(tol=1e-11, max_steps=300))
    for name, own in found.items():
        error = float((own - wanted[name]).norm())
        assert error <= 1e-6 * float(wanted[name].norm()), name


@pytest.mark.parametrize("estimator", EXACT, ids=["AEP", "Implicit"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_part_changes_force_and_gradients_alike(
    change: Callable[[ap.AbstractDynamics], None], estimator: ap.AbstractEstimator
) -> None:
    s = system("gated", seed=2)
    change(s.dynamics)
    compare(s.dynamics, s.x, estimator)


def test_concrete_classes_are_final_and_say_what_to_write() -> None:
    """A closed form of the base would be claimed of another force."""
    for base, root, words in (
        (ap.GatedBlock, "AbstractDynamics", "ap.from_function"),
        (ap.Layered, "AbstractDynamics", "hold a Layered"),
        (ap.Anderson, "AbstractSolver", "call its solve"),
        (ap.AEP, "AbstractAdjointEstimator", "call its adjoint"),
    ):
        with pytest.raises(ap.ConfigError, match=f"{words}.*, or derive from {root}$"):
            exec(f"class Own(ap.{base.__name__}): pass", {"ap": ap, "__name__": __name__})

    inner = ap.GatedBlock(4, heads=2, init_std=0.25).double()
    nn.init.normal_(inner.alpha, std=0.25)
    held = ap.from_function(lambda z, x: inner(z, x) - 0.1 * z, inner)
    compare(held, torch.randn(2, 3, 4, dtype=torch.float64), ap.AEP(tol=1e-9, response=1e-5))


def test_a_hook_that_changes_an_output_changes_what_is_recorded() -> None:
    s = system("gated", seed=2)
    hooked(s.dynamics)
    driven, z = s.dynamics.under(s.x), s.x + 0.1
    assert torch.equal(driven.record(z)[0], s.dynamics(z, s.x))


def test_an_input_made_in_inference_mode_can_be_learned_from() -> None:
    s = system("gated", seed=2)
    with torch.inference_mode():
        x = s.x + 0
    grads = []
    for given in (x, s.x):
        s.dynamics.zero_grad()
        ap.Equilibrium(s.dynamics)(given).sum().backward()
        grads.append(s.dynamics.up.weight.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_on_parts_are_called(kind: str) -> None:
    s = system("gated", seed=2)
    calls = []
    if kind == "forward":
        s.dynamics.up.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    else:
        s.dynamics.up.register_full_backward_hook(lambda *_: calls.append(True))
    ap.Equilibrium(s.dynamics)(s.x).sum().backward()
    assert True in calls


def test_a_hook_keeps_what_it_saw() -> None:
    """The activation is computed in place only where nobody holds what it works on."""
    s = system("gated", seed=2)
    seen = []
    s.dynamics.up.register_forward_hook(lambda m, args, out: seen.append((out, out.clone())))
    with torch.no_grad():
        s.dynamics(s.x, s.x)
    for kept, copied in seen:
        assert torch.equal(kept, copied)
