"""Every dynamics: its closed forms, its exact gradients, its cache, and a user's own force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.equilibrium.dynamics import linearised
from altprop.testing import check_dynamics
from systems import NEAR, TIGHT, System, damped, gated, jacobian, task, worst


def perturbed(block: nn.Module) -> nn.Module:
    """Return `block` with no norm, bias or gain at a special point."""
    with torch.no_grad():
        for name, p in block.named_parameters():
            if p.dim() == 1:
                p.mul_(0.9) if "scale" in name else p.add_(0.2 * torch.randn(p.shape))
    return block


def thick(**settings: object) -> System:
    torch.manual_seed(0)
    block = ap.ThickBlock(8, 2, scale=0.3, damping=1.0, expansion=2, init_std=0.2, **settings)
    return task(perturbed(block), 2, 3)


def stacked(layers: int = 3) -> System:
    torch.manual_seed(1)
    return task(perturbed(ap.GatedStack(8, 2, layers, expansion=2, init_std=0.25)), 2, 3)


def hopfield() -> System:
    torch.manual_seed(0)
    return task(ap.HopfieldMemory(6, 6, scale=2.0), 2, 3)


def plain_function() -> System:
    W = nn.Parameter(0.3 * torch.randn(6, 6, dtype=torch.float64))
    return task(ap.from_function(lambda z, x, W: x - z + torch.tanh(z @ W), W=W), 2, 3)


SYSTEMS: dict[str, Callable[[], System]] = {
    "damped": lambda: damped(2, 3, scale=0.7, damping=0.5),
    "gated": lambda: gated(2, 3),
    "gated, one token": lambda: gated(2, 1),
    "stack": stacked,
    "thick": thick,
    "thick rms": lambda: thick(norm="rms", qk_norm=True, channel_gain=True),
    "hopfield": hopfield,
    "from_function": plain_function,
}
CAUSAL = ["damped", "gated", "stack", "thick", "thick rms"]


@pytest.fixture(params=SYSTEMS)
def this(request: pytest.FixtureRequest) -> System:
    return SYSTEMS[request.param]()


def test_every_dynamics_keeps_the_contract(this: System) -> None:
    check_dynamics(this.dynamics, this.x)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("slices", [1, 2])
def test_long_windows_keep_it_too(name: str, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the attention matrix is not kept; the last slice of tokens is a short one."""
    monkeypatch.setattr(linearised, "_DENSE", 1)
    monkeypatch.setattr(linearised, "_LEAST", slices)
    this = SYSTEMS[name]()
    assert this.dynamics.linearise(this.x, this.x).tells_tokens
    check_dynamics(this.dynamics, this.x)


def test_implicit_equals_finite_differences_and_aep_equals_implicit(this: System) -> None:
    wanted = this.gradients()
    for name, g in wanted.items():
        direction = torch.randn_like(g)
        direction /= direction.norm()
        ends = []
        for move in (1e-5, -2e-5):
            this.named()[name].add_(move * direction)
            ends.append(this.loss())
        this.named()[name].add_(1e-5 * direction)
        typical = float(g.norm()) / g.numel() ** 0.5  # the size of a slope in a random direction
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope - float((g * direction).sum())) <= 1e-5 * typical, name
    assert worst(this.gradients(ap.AEP(**NEAR)), wanted) <= 1e-5


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_solved_one_by_one_are_those_of_the_window(name: str) -> None:
    this = SYSTEMS[name]()
    block, cache, states = this.block(), None, []
    for x in (this.x[:, :1], this.x[:, 1:]):  # one new token, then two beside the cache
        z, cache = block.extend(x, cache)
        states.append(z)
    assert torch.allclose(torch.cat(states, 1), block(this.x), rtol=1e-10, atol=1e-10)


def test_a_cache_can_be_extended_twice() -> None:
    this = damped(2, 3, scale=0.5)
    block = this.block()
    _, cache = block.extend(this.x[:, :1])
    first, _ = block.extend(this.x[:, 1:2], cache)
    block.extend(this.x[:, 2:], cache)
    again, _ = block.extend(this.x[:, 1:2], cache)
    assert torch.equal(first, again)


def test_a_dynamics_without_a_cache_says_so() -> None:
    with pytest.raises(ap.RuleError, match="keeps no cache"):
        hopfield().block().extend(torch.zeros(1, 1, 6, dtype=torch.float64))


def test_where_nothing_is_attended_to_the_natural_step_reaches_the_equilibrium_at_once() -> None:
    dynamics = ap.DampedAttention(8, 2, scale=0.7, damping=2.0).double()
    torch.nn.init.zeros_(dynamics.attention.W_O)
    z, x = torch.randn(2, 2, 3, 8).double()
    assert torch.allclose(dynamics(z + dynamics.step * dynamics(z, x), x), torch.zeros(()).double())


def test_the_hopfield_force_descends_its_energy_and_needs_no_correction() -> None:
    this = hopfield()
    memory = this.dynamics
    z = (this.x + torch.randn_like(this.x)).requires_grad_()
    (slope,) = torch.autograd.grad(memory.energy(z, this.x).sum(), z)
    assert torch.allclose(memory(z, this.x), -slope)
    J = jacobian(memory, z.detach(), this.x)
    assert torch.allclose(J, J.T)
    assert worst(this.gradients(ap.EP(**NEAR)), this.gradients()) <= 1e-7


def test_a_stack_of_one_is_the_gated_block() -> None:
    this = stacked(layers=1)
    block = ap.GatedBlock(8, 2, expansion=2).double()
    state = {k.removeprefix("first."): v for k, v in this.dynamics.state_dict().items()}
    block.load_state_dict(state)
    z = torch.randn_like(this.x)
    assert torch.allclose(this.dynamics(z, this.x), block(z, this.x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layers", [1, 3])
def test_with_a_closed_gate_a_stack_is_a_feed_forward_transformer(layers: int) -> None:
    this = stacked(layers)
    nn.init.zeros_(this.dynamics.gate)
    h = this.x
    for block in (this.dynamics.first, *this.dynamics.rest):
        u = h + block.attention(block.norm1(h))
        h = u + block.down(nn.functional.gelu(block.up(block.norm2(u))))
    z = torch.randn_like(this.x)  # whatever the state
    assert torch.allclose(this.dynamics(z, this.x) + z, h, rtol=1e-12, atol=1e-13)
    assert torch.allclose(this.block()(this.x), h, rtol=1e-12, atol=1e-12)


# a user's own force


def test_a_force_may_be_a_module_close_over_one_or_take_parameters() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    x = torch.randn(2, 4, dtype=torch.float64)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x - z + torch.tanh(self.layer(z)) / 2

    def named(z: Tensor, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return x - z + torch.tanh(z @ W.T + b) / 2

    forms = [
        ap.from_function(Own()),
        ap.from_function(lambda z, x: x - z + torch.tanh(layer(z)) / 2, layer),
        ap.from_function(named, W=layer.weight, b=layer.bias),
    ]
    seen = []
    for dynamics in forms:
        assert {id(p) for p in dynamics.parameters()} == {id(p) for p in layer.parameters()}
        layer.zero_grad()
        ap.Equilibrium(dynamics, TIGHT)(x).sum().backward()
        seen.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    assert torch.allclose(seen[0], seen[1]) and torch.allclose(seen[0], seen[2])


@pytest.mark.parametrize(
    "names",
    [("keys", "values"), ("forward", "training"), ("keys", "keys_"), ("up.weight", "up_weight")],
)
def test_parameters_may_have_any_names(names: tuple[str, str]) -> None:
    k, v = (nn.Parameter(0.3 * torch.randn(6, 4, dtype=torch.float64)) for _ in names)

    def force(z: Tensor, x: Tensor, **given: Tensor) -> Tensor:
        return x - z + torch.tanh(z @ given[names[0]].T) @ given[names[1]]

    dynamics = ap.from_function(force, **dict(zip(names, (k, v), strict=True)))
    assert [id(p) for p in dynamics.parameters()] == [id(k), id(v)]
    plain = ap.from_function(lambda z, x, K, V: x - z + torch.tanh(z @ K.T) @ V, K=k, V=v)
    x, found = torch.randn(2, 4, dtype=torch.float64), []
    for each in (dynamics, plain):
        each.zero_grad()
        ap.Equilibrium(each, TIGHT)(x).sum().backward()
        found.append(torch.cat([k.grad, v.grad]))
    assert torch.equal(*found)
    assert list(plain.state_dict()) == ["_passed.K", "_passed.V"]


def test_a_force_over_parameters_that_were_not_given_is_refused() -> None:
    hidden = nn.Linear(4, 4)
    with pytest.raises(ap.ConfigError, match=r"write from_function\(force, hidden\)"):
        ap.from_function(lambda z, x: hidden(x) - z)


def test_further_arguments_reach_every_force() -> None:
    dynamics = ap.from_function(lambda z, x, mask: (x + 0.5 * torch.tanh(z)) * mask - z)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)
    z = ap.Equilibrium(dynamics, TIGHT)(x, mask)
    z.sum().backward()
    assert not z[:, 1].any() and not x.grad[:, 1].any() and x.grad[:, 0].all()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ap.ThickBlock(8, 2, damping=-1), "damping is -1"),
        (lambda: ap.ThickBlock(8, 2, norm="batch"), "norm is 'batch'"),
        (lambda: ap.HopfieldMemory(8, 0), "memories 0"),
        (lambda: ap.from_function(lambda z, x: x - z, step=0), "step is 0"),
        (lambda: ap.DampedAttention(8, 3), "heads is 3 and d_model is 8: heads must divide"),
        (lambda: ap.DampedAttention(8, 0), "heads is 0 and d_model is 8: heads must divide"),
        (lambda: ap.DampedAttention(8, 2, 2.0, -0.5), "scale is 2.0 and damping is -0.5: 1 \\+"),
        (lambda: ap.GatedBlock(8, 3), "heads is 3 and d_model is 8: heads must divide"),
        (lambda: ap.GatedBlock(8, 2, 0), "expansion is 0, expected at least 1"),
        (lambda: ap.GatedStack(8, 2, layers=0), "layers is 0, expected at least 1"),
    ],
)
def test_settings_that_no_dynamics_can_have_are_refused(
    make: Callable[[], object], names: str
) -> None:
    with pytest.raises(ap.ConfigError, match=names):
        make()
