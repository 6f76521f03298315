"""One evaluation in closed form is recorded, shared, kept and freed; foreign parts have none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import altprop as ap
from altprop.equilibrium.dynamics.attention import CausalAttention
from altprop.equilibrium.dynamics.products import AbstractEvaluation, AbstractLinearisation
from systems import System, error, exact, gradient, gradients, system, worst

CLOSED = ["damped", "gated", "thick", "thick rms", "thick gains"]


def recorded(s: System) -> tuple[Callable[[], AbstractLinearisation], Tensor, Tensor]:
    z = s.x + 0.1
    force, linearise = s.dynamics.under(s.x).record(z)
    return linearise, z, force


@pytest.mark.parametrize("kind", CLOSED)
def test_one_evaluation_gives_the_record_and_the_linearisation(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = system(kind, seed=1)
    alone = s.dynamics.linearise(s.x + 0.1, s.x)
    made, evaluate = [], type(s.dynamics).evaluate
    monkeypatch.setattr(
        type(s.dynamics), "evaluate", lambda *a: made.append(0) or evaluate(*a), raising=True
    )
    linearise, z, force = recorded(s)
    shared, v = linearise(), torch.randn_like(z)
    assert type(force.grad_fn).__name__ == "_AssignPullBackward"
    force.sum().backward()
    assert len(made) == 1
    assert torch.allclose(shared.vjp(v), alone.vjp(v), rtol=1e-12, atol=1e-14)
    assert torch.allclose(shared.jvp(v), alone.jvp(v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", CLOSED)
def test_what_does_not_learn_gets_no_gradient(kind: str) -> None:
    s = system(kind, seed=1)
    parameters = dict(s.dynamics.named_parameters())
    wanted = torch.autograd.grad(s.dynamics(s.x + 0.1, s.x).sum(), list(parameters.values()))
    for learns, own in zip(parameters, wanted, strict=True):
        for name, p in parameters.items():
            p.requires_grad_(name == learns)
            p.grad = None
        recorded(s)[2].sum().backward()
        assert [n for n, p in parameters.items() if p.grad is not None] == [learns]
        assert error(parameters[learns].grad, own) <= 1e-12, learns


def followed(s: System, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[AbstractEvaluation]]:
    """Return where references to all evaluations of the dynamics are put as they are made."""
    seen: list[weakref.ref[AbstractEvaluation]] = []
    evaluate = type(s.dynamics).evaluate

    def follow(*args: object) -> AbstractEvaluation:
        made = evaluate(*args)
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


def test_a_checkpoint_keeps_no_evaluation_and_copied_tensors_give_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = system("gated", seed=1)
    block = s.block()
    wanted = gradients(block, s.x, s.cost)
    seen = followed(s, monkeypatch)

    def checkpointed(x: Tensor, cost: object) -> Tensor:
        z = checkpoint(block, x, use_reentrant=False)
        assert [r() for r in seen] == [None]
        return z

    checkpointed.zero_grad = block.zero_grad
    checkpointed.named_parameters = block.named_parameters
    assert worst(gradients(checkpointed, s.x, s.cost), wanted) <= 1e-8

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert worst(gradients(block, s.x, s.cost), wanted) <= 1e-8


def test_weights_changed_before_the_backward_pass_are_refused() -> None:
    s = system("gated", seed=1)
    loss = s.cost(ap.Equilibrium(s.dynamics)(s.x))
    with torch.no_grad():
        s.dynamics.up.weight.mul_(2)
    with pytest.raises(ap.RuleError, match=r"in place after the forward pass \(up.weight\)"):
        loss.backward()


# parts that compute something else: the oracle differentiates a relaxation, and so knows nothing
# of closed forms


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


def quieter(d: ap.GatedBlock) -> None:
    other = Quieter(4, 2, 0.25).double()
    other.load_state_dict(d.attention.state_dict())
    d.attention = other


def adapted(d: ap.GatedBlock) -> None:
    d.up = Adapted(d.up)


def without_bias(d: ap.GatedBlock) -> None:
    d.up = nn.Linear(4, 8, bias=False).double()


def without_gain(d: ap.GatedBlock) -> None:
    d.norm2 = nn.RMSNorm(4, elementwise_affine=False)


def of_two_axes(d: ap.GatedBlock) -> None:
    d.norm1, d.norm2 = nn.LayerNorm((3, 4)).double(), nn.RMSNorm((3, 4), eps=1e-6).double()
    for norm in (d.norm1, d.norm2):
        nn.init.normal_(norm.weight, 1, 0.3)


def of_another_kind(d: ap.GatedBlock) -> None:
    d.norm2 = nn.Linear(4, 4).double()


def queries_normed_otherwise(d: ap.GatedBlock) -> None:
    d.attention.norm_q, d.attention.norm_k = (nn.LayerNorm(2, eps=0.3).double() for _ in range(2))


def on_the_instance(d: ap.GatedBlock) -> None:
    inner = d.attention.forward
    d.attention.forward = lambda z: 0.5 * inner(z)


def combined_on_the_instance(d: ap.GatedBlock) -> None:
    inner = d.combine
    d.combine = lambda z, x, mixed: inner(z, x, 0.5 * mixed)


def louder_weights(d: ap.GatedBlock) -> None:
    parametrizations.weight_norm(d.up)


def scaled_projection(d: ap.GatedBlock) -> None:
    parametrize.register_parametrization(d.attention, "W_V", Scaled())


def scaled_gate(d: ap.GatedBlock) -> None:
    parametrize.register_parametrization(d, "alpha", Scaled())


CHANGES: list[Callable[[ap.GatedBlock], None]] = [
    quieter,
    adapted,
    without_bias,
    without_gain,
    of_two_axes,
    of_another_kind,
    queries_normed_otherwise,
    on_the_instance,
    combined_on_the_instance,
    louder_weights,
    scaled_projection,
    scaled_gate,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_part_changes_force_and_gradients_alike(
    change: Callable[[ap.GatedBlock], None],
) -> None:
    s = system("gated", seed=2)
    change(s.dynamics)
    wanted, _ = gradient(s, ap.BPTT(), ap.Euler(step=0.5, max_steps=120))
    for estimator in (ap.AEP(beta=1e-4, tol=1e-9), ap.Implicit(tol=1e-10)):
        assert error(gradient(s, estimator)[0], wanted) <= 1e-6


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_circle_of_nudges_is_exact_on_a_changed_part_or_refused(
    change: Callable[[ap.GatedBlock], None],
) -> None:
    s = system("gated", seed=2)
    change(s.dynamics)
    try:
        found, _ = gradient(s, ap.HolomorphicEP(tol=1e-9))
    except ap.RuleError as said:
        assert "is not the force: at the free" in str(said) or "Linear stands in" in str(said)
        assert "estimator=AEP()" in str(said) and "\n" not in str(said)
    else:
        assert error(found, exact(s)) <= 1e-6


def test_a_hook_that_changes_an_output_changes_what_is_recorded() -> None:
    s = system("gated", seed=2)
    s.dynamics.attention.register_forward_hook(lambda m, args, out: 0.5 * out)
    _, z, force = recorded(s)
    assert torch.equal(force, s.dynamics(z, s.x))


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "the output": lambda m: m.register_forward_hook(lambda m, given, out: 0.5 * out),
    "the input": lambda m: m.register_forward_pre_hook(
        lambda m, given: (0.5 * given[0], *given[1:])
    ),
    "a method": lambda m: setattr(m, "forward", halved(m.forward)),
}


def halved(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: 0.5 * forward(*given)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "part", ["gated.attention", "gated.norm2", "damped.attention", "gated.", "hopfield."]
)
def test_a_hook_that_changes_what_a_part_does_changes_the_jacobian(part: str, hook: str) -> None:
    """The dynamics itself is hooked where no part is named."""
    kind, _, name = part.partition(".")
    s = system("gated" if kind == "hopfield" else kind, seed=2)
    if kind == "hopfield":
        s.dynamics = ap.HopfieldMemory(s.x.shape[-1], memories=5, scale=0.05).double()
    HOOKS[hook](s.dynamics.get_submodule(name))
    wanted, _ = gradient(s, ap.BPTT(), ap.Euler(step=0.3, max_steps=250))
    for estimator in (ap.AEP(beta=1e-4, tol=1e-9), ap.Implicit(tol=1e-10)):
        assert error(gradient(s, estimator)[0], wanted) <= 1e-6
    words = "has no analytic force" if kind == "hopfield" else "the analytic force is not the force"
    if name or kind == "hopfield":  # (half a force vanishes where it does)
        with pytest.raises(ap.RuleError, match=words):
            gradient(s, ap.HolomorphicEP())


def test_concrete_classes_are_final_and_say_what_to_write() -> None:
    """A closed form of the base would be claimed of another force."""
    for base, root, words in (
        (ap.GatedBlock, "AbstractDynamics", "ap.from_function"),
        (ap.Layered, "AbstractDynamics", "hold a Layered"),
        (ap.Anderson, "AbstractSolver", "call its solve"),
        (ap.AEP, "AbstractAdjointEstimator", "call its adjoint"),
    ):
        with pytest.raises(ap.ConfigError, match=f"{words}.*, or derive from {root}$"):
            type("Own", (base,), {"__module__": __name__})
    s = system("gated", seed=2)
    inner = s.dynamics
    s.dynamics = ap.from_function(lambda z, x: inner(z, x) - 0.1 * z, inner)
    assert error(gradient(s, ap.AEP(tol=1e-9, response=1e-5))[0], exact(s)) <= 1e-6


def test_a_force_that_is_another_one_where_autograd_records_is_refused() -> None:
    x = torch.randn(2, 5, 8)
    uneven = ap.from_function(lambda z, x: x - z + 0.3 * torch.is_grad_enabled())
    for solver in (ap.Anderson(), ap.NewtonKrylov(), ap.Fallback()):
        with pytest.raises(ap.RuleError, match="that autograd records.*is_grad_enabled"):
            ap.Equilibrium(uneven, solver, on_failure="accept")(x.clone().requires_grad_())
    with torch.no_grad():  # where nothing is recorded there is one force
        assert ap.Equilibrium(uneven)(x).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_padding_in_an_encoder_is_told_where_it_is_zeroed_without_a_record_alone() -> None:
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for nested in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)

        def force(z: Tensor, x: Tensor, mask: Tensor, inner: nn.Module = encoder) -> Tensor:
            return x - z + 0.1 * inner(z, src_key_padding_mask=mask)

        block = ap.Equilibrium(ap.from_function(force, encoder)).eval()
        if nested:
            with pytest.raises(ap.RuleError, match="enable_nested_tensor=False"):
                block(x, padding)
        else:
            assert block(x, padding).isfinite().all() and bool(block.certificate.result)


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
def test_hooks_on_parts_are_called_and_keep_what_they_saw(kind: str) -> None:
    s, calls, seen = system("gated", seed=2), [], []
    if kind == "forward":  # so weights that a hook makes are recorded too
        s.dynamics.up.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    else:
        s.dynamics.up.register_full_backward_hook(lambda *_: calls.append(True))
    ap.Equilibrium(s.dynamics)(s.x).sum().backward()
    assert True in calls
    # the activation is computed in place only where nobody holds what it works on
    s.dynamics.up.register_forward_hook(lambda m, args, out: seen.append((out, out.clone())))
    with torch.no_grad():
        s.dynamics(s.x, s.x)
    assert all(torch.equal(kept, copied) for kept, copied in seen)


def test_an_activation_is_not_computed_in_what_a_method_on_the_instance_keeps() -> None:
    s, kept = system("gated", seed=2), torch.randn(2, 3, 8, dtype=torch.float64)
    before = kept.clone()
    s.dynamics.up.forward = lambda h: kept
    with torch.no_grad():
        s.dynamics(s.x, s.x)
    assert torch.equal(kept, before)
