"""torch.func's transforms of a converted model: what a loop over samples or networks gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import altprop as ap
from test_rules import RULES

Params = dict[str, Tensor]
COUNTED = [r for r in RULES if getattr(r, "noisy", False) or getattr(r, "period", 0)]
COUNTED += [r for r in RULES if isinstance(r, ap.GrAPE) and r not in COUNTED]
FREE = [r for r in RULES if r not in COUNTED]


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused one has no transforms of its own
        yield


class Block(nn.Module):
    sublayer_outputs = ("down",)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def converted(rule: ap.AbstractRule) -> Net:
    torch.manual_seed(0)
    return ap.convert(Net().double(), rule, output="head")


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4, 7, k, generator=generator, dtype=torch.float64) for k in (5, 3))
    return x, y


def loss_of(model: nn.Module) -> Callable[[Params, Tensor, Tensor], Tensor]:
    return lambda p, x, y: (functional_call(model, p, (x,)) - y).square().sum()


def parameters(model: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Params:
    model.zero_grad()
    (model(x) - y).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def close(got: Params, want: Params, tolerance: float = 1e-11) -> None:
    assert got.keys() == want.keys()
    for name, g in got.items():
        assert g.shape == want[name].shape, name
        assert float((g - want[name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize("rule", FREE, ids=str)
def test_vmap_of_grad_gives_the_gradient_of_each_sample(rule: ap.AbstractRule) -> None:
    model, (x, y) = converted(rule), data()
    each = vmap(grad(loss_of(model)), in_dims=(None, 0, 0))(parameters(model), x, y)
    for i in range(len(x)):
        close({n: g[i] for n, g in each.items()}, backward(model, x[i : i + 1], y[i : i + 1]))


@pytest.mark.parametrize("rule", FREE, ids=str)
def test_vmap_over_stacked_parameters_trains_several_networks_at_once(
    rule: ap.AbstractRule,
) -> None:
    model, (x, y) = converted(rule), data()
    stacked = {n: torch.stack([p, 1.5 * p + 0.1]) for n, p in parameters(model).items()}
    both = vmap(grad(loss_of(model)), in_dims=(0, None, None))(stacked, x, y)
    for i in range(2):
        model.load_state_dict({n: p[i] for n, p in stacked.items()}, strict=False)
        close({n: g[i] for n, g in both.items()}, backward(model, x, y))


def summed(run: Callable[[Params], Tensor], given: Params) -> Params:
    return grad(run)(given)


def written(run: Callable[[Params], Tensor], given: Params) -> Params:
    """Return what an ordinary backward pass, outside all transforms, writes."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    run(leaves).backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("gradient", [summed, written])
@pytest.mark.parametrize("rule", FREE, ids=str)
def test_the_gradient_of_a_vmapped_loss_is_that_of_each_network_and_sample_by_itself(
    rule: ap.AbstractRule, gradient: Callable[..., Params]
) -> None:
    models, (x, y) = [converted(rule) for _ in range(3)], data()
    for i, model in enumerate(models):
        model.load_state_dict({n: (1 + i / 2) * t + i / 9 for n, t in model.state_dict().items()})
    stacked, buffers = stack_module_state(models)
    stacked = {name: p.detach() for name, p in stacked.items()}

    def loss(p: Params, b: Params, x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(models[0], (p, b), (x,)) - y).square().sum()

    got = gradient(
        lambda p: vmap(loss, in_dims=(0, 0, None, None))(p, buffers, x, y).sum(), stacked
    )
    for i, model in enumerate(models):
        close({n: g[i] for n, g in got.items()}, backward(model, x, y), 1e-8)
    first, own = parameters(models[0]), dict(models[0].named_buffers())
    got = gradient(lambda p: vmap(loss, in_dims=(None, None, 0, 0))(p, own, x, y).sum(), first)
    close(got, backward(models[0], x, y), 1e-8)


@pytest.mark.parametrize("rule", [ap.KolenPollack(), ap.DirectFeedback()], ids=str)
def test_what_is_frozen_gets_no_gradient_from_a_vmapped_loss(rule: ap.AbstractRule) -> None:
    model, (x, y) = converted(rule), data()
    given = {n: torch.stack([p, 1.5 * p]) for n, p in parameters(model).items()}
    for name, t in given.items():
        t.requires_grad_(name != "blocks.0.up.weight")
    vmap(loss_of(model), in_dims=(0, None, None))(given, x, y).sum().backward()
    frozen = {name for name, t in given.items() if t.grad is None or not t.grad.any()}
    assert frozen == given.keys() & {"blocks.0.up.weight", "blocks.0.up.B"}


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
@pytest.mark.parametrize(
    "rule",
    [ap.KolenPollack(), ap.DirectFeedback()],  # one of each seam
    ids=str,
)
def test_compiled_transforms_give_the_gradients_of_uncompiled_ones(rule: ap.AbstractRule) -> None:
    model, (x, y) = converted(rule), data()
    given = {n: torch.stack([p, 1.5 * p]) for n, p in parameters(model).items()}

    def inside(p: Params) -> Params:
        found, to_x = vmap(grad(loss_of(model), argnums=(0, 1)), in_dims=(0, None, None))(p, x, y)
        return {**found, "x": to_x.sum(0)}

    def outside(p: Params) -> Params:
        def total(p: Params, x: Tensor) -> Tensor:
            return vmap(loss_of(model), in_dims=(0, None, None))(p, x, y).sum()

        found, to_x = grad(total, argnums=(0, 1))(p, x)
        return {**found, "x": to_x}

    for transform in (inside, outside):
        torch._dynamo.reset()
        close(torch.compile(transform, backend="aot_eager")(given), inside(given), 1e-8)
    torch._dynamo.reset()


@pytest.mark.parametrize("rule", FREE, ids=str)
def test_jacrev_has_one_backward_pass_per_output_for_its_rows(rule: ap.AbstractRule) -> None:
    model, (x, _) = converted(rule), data()
    x = x[:1, :2]
    rows = jacrev(lambda p: functional_call(model, p, (x,)).flatten())(parameters(model))
    for i in range(6):
        model.zero_grad()
        model(x).flatten()[i].backward()
        close({n: r[i] for n, r in rows.items()}, {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_functional_call_uses_the_parameters_that_it_is_given(rule: ap.AbstractRule) -> None:
    model, twin, (x, y) = converted(rule), converted(rule), data()
    given = {n: (1.5 * p + 0.1).requires_grad_() for n, p in parameters(model).items()}
    (functional_call(model, given, (x,)) - y).square().sum().backward()
    twin.load_state_dict(given, strict=False)
    close({n: p.grad for n, p in given.items()}, backward(twin, x, y))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rule", [r for r in FREE if not isinstance(r, ap.Backprop)], ids=str)
def test_a_second_derivative_and_a_forward_derivative_are_refused(rule: ap.AbstractRule) -> None:
    model, (x, y) = converted(rule), data()
    first = grad(loss_of(model))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad(lambda p: sum(g.square().sum() for g in first(p, x, y).values()))(parameters(model))
    with pytest.raises(ap.RuleError, match="no forward-mode derivative"):
        jvp(model, (x,), (x,))
    with torch.no_grad():  # the forward pass itself has one, and it is exact
        value, pushed = jvp(model, (x,), (x,))
    with ap.rules_off(model):
        assert torch.equal(value, model(x))
        close({"": pushed}, {"": torch.autograd.functional.jvp(model, x, x)[1]})


@pytest.mark.parametrize("rule", COUNTED, ids=str)
def test_a_rule_that_counts_its_passes_is_refused_in_a_transform_in_one_line(
    rule: ap.AbstractRule,
) -> None:
    model, (x, y) = converted(rule), data()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ap.RuleError, match=r"inside a transform.*loss\.backward") as caught:
        vmap(grad(loss_of(model)), in_dims=(None, 0, 0))(parameters(model), x, y)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(vmap(model)(x), model(x), atol=1e-12)
    twin = converted(rule)
    close(backward(model, x, y), backward(twin, x, y))  # and afterwards all is as it was


@pytest.mark.parametrize("estimator", [ap.AEP(), ap.Implicit(), ap.OneStep()], ids=str)
def test_an_equilibrium_is_refused_in_a_transform_in_one_line(
    estimator: ap.AbstractEstimator,
) -> None:
    block = ap.Equilibrium(ap.DampedAttention(6, 2), estimator=estimator)
    with pytest.raises(ap.RuleError, match=r"equilibrium.*inside a transform") as caught:
        grad(lambda x: block(x).square().sum())(torch.randn(1, 3, 6))
    assert "\n" not in str(caught.value)


def test_a_solve_under_vmap_is_refused_in_one_line() -> None:
    block = ap.Equilibrium(ap.DampedAttention(4, heads=2))
    stack = ap.convert(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), {"": ap.AEP()})
    for model, x in ((block, torch.randn(3, 2, 5, 4)), (stack, torch.randn(3, 2, 4))):
        with pytest.raises(ap.RuleError, match=r"inside vmap.*give all samples at once"):
            torch.func.vmap(model)(x)
