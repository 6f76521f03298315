"""Samples must not see each other, nor an evaluation change anything: both are found by itself."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.equilibrium.dynamics import conduct
from altprop.testing import check_dynamics
from systems import EXACT, TIGHT, flat, system


class Own(ap.AbstractDynamics):
    """`F = x − z + tanh(f(z)) / 3` with any modules `f`."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + torch.tanh(self.parts(z)) / 3


class Counter(nn.Module):
    """Count its own calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z


class SeqFirst(nn.Module):
    """A force on `(T, N, C)`, as torch's attention reads it by default."""

    def __init__(self, mask: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2).double()
        self.mask = mask

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        mask = torch.ones(len(z), len(z), dtype=torch.bool).triu(1) if self.mask else None
        return x - z + self.attention(z, z, z, need_weights=False, attn_mask=mask)[0] / 3


def as_function(*parts: nn.Module) -> ap.AbstractDynamics:
    body = nn.Sequential(*parts)
    return ap.from_function(lambda z, x: x - z + torch.tanh(body(z)) / 3, body)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}


def still(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(b, before[name]) for name, b in module.named_buffers())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


MIXING: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "synchronised": lambda: nn.SyncBatchNorm(4),
    "without statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
}


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("make", [as_function, Own])
@pytest.mark.parametrize("estimator", [ap.AEP(), EXACT, ap.BPTT()], ids=lambda e: type(e).__name__)
def test_batch_statistics_are_refused_before_anything_changes(
    kind: str, make: Any, estimator: ap.AbstractEstimator
) -> None:
    dynamics = make(nn.Linear(4, 4), MIXING[kind]()).double()
    block, before = (
        ap.Equilibrium(dynamics, ap.Euler(step=1.0, max_steps=9), estimator),
        state(dynamics),
    )
    with pytest.raises(ap.RuleError, match=r"batch norm \(\w+\).*LayerNorm or GroupNorm") as error:
        block(normal(6, 4))
    assert "\n" not in str(error.value) and block.certificate is None
    assert still(dynamics, before)
    if kind == "without statistics":
        with torch.no_grad(), pytest.raises(ap.RuleError, match="batch norm"):
            block.eval()(normal(6, 4))  # in evaluation mode as well, unseen by the products


def test_batch_norm_that_a_force_only_closes_over_is_seen() -> None:
    norm = nn.BatchNorm1d(4, affine=False)
    block = ap.Equilibrium(ap.from_function(lambda z, x: x - z + norm(z) / 3))
    with pytest.raises(ap.RuleError, match="batch norm"):
        block(torch.randn(6, 4))
    assert not norm.num_batches_tracked


def test_in_evaluation_mode_batch_norm_is_a_map_like_any_other() -> None:
    dynamics = as_function(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().eval()
    for b in dynamics.buffers():
        if b.is_floating_point():
            b += 0.3
    x, v = torch.randn(2, 6, 4, dtype=torch.float64)
    block = ap.Equilibrium(dynamics, TIGHT, EXACT)
    leaf = x.clone().requires_grad_()
    block(leaf).square().sum().backward()
    ends = [block(x + move * v).detach().square().sum() for move in (1e-5, -1e-5)]
    assert float((leaf.grad * v).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-8)
    with pytest.raises(ap.RuleError, match="batch norm"):  # what was seen before is no leave
        block.train()(x)


@pytest.mark.parametrize("kind", ["counter", "spectral norm"])
@pytest.mark.parametrize("make", [as_function, Own])
def test_a_force_that_changes_its_buffers_is_refused_and_they_are_put_back(
    kind: str, make: Any
) -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    dynamics = make(nn.Linear(4, 4), Counter() if kind == "counter" else spectral).double()
    before = state(dynamics)
    for estimator in (ap.AEP(), EXACT):
        with pytest.raises(ap.RuleError, match="changes its buffers .*evaluation mode") as error:
            ap.Equilibrium(dynamics, TIGHT, estimator)(normal(3, 4))
        assert "\n" not in str(error.value) and still(dynamics, before)
    if kind == "spectral norm":  # in evaluation mode it iterates no further
        block = ap.Equilibrium(dynamics.eval())
        block(normal(3, 4)).sum().backward()
        with pytest.raises(ap.RuleError, match="changes its buffers"):
            block.train()(normal(3, 4))
        assert still(dynamics, before)


def test_a_buffer_that_changes_later_on_is_found_as_well() -> None:
    counter = Counter()
    switched = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    block = ap.Equilibrium(as_function(switched).double())
    x = torch.randn(3, 4, dtype=torch.float64)
    block(x)
    switched[1] = counter
    with pytest.raises(ap.RuleError, match="changes its buffers"):
        block(x)


W = 0.3 * torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FORCES: dict[str, Callable[[], Any]] = {
    "batch mean": lambda: lambda z, x: x - z + torch.tanh(z @ W - z.mean(0)) / 3,
    "sums from the first": lambda: lambda z, x: x - z + torch.tanh(z.cumsum(0) @ W) / 9,
    "sums from the last": lambda: lambda z, x: x - z + torch.tanh(z.flip(0).cumsum(0).flip(0)) / 9,
    "neighbours": lambda: lambda z, x: x - z + torch.tanh(z.roll(1, 0) @ W) / 3,
    "time first": lambda: SeqFirst(),
    "time first, causal": lambda: SeqFirst(mask=True),
}


@pytest.mark.parametrize("kind", FORCES)
@pytest.mark.parametrize("estimator", [ap.AEP(), ap.Implicit(), ap.EP(), ap.OneStep()], ids=str)
def test_samples_that_interact_are_refused_in_the_first_call(
    kind: str, estimator: ap.AbstractEstimator
) -> None:
    block = ap.Equilibrium(ap.from_function(FORCES[kind]()), estimator=estimator)
    for _ in range(4):  # and in every one after it
        with pytest.raises(ap.RuleError, match="samples interact.*must lie on axis 0") as error:
            block(normal(5, 3, 4).requires_grad_())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", [False, True])
def test_transposed_inside_the_force_a_batch_has_the_sum_of_its_samples_gradients(
    mask: bool,
) -> None:
    inner = SeqFirst(mask)
    dynamics = ap.from_function(
        lambda z, x: inner(z.transpose(0, 1), x.transpose(0, 1)).transpose(0, 1), inner
    )
    block = ap.Equilibrium(dynamics, TIGHT, EXACT)
    x = normal(3, 3, 4)  # a square, so that no axis is known by its size

    def gradient(batch: Tensor) -> Tensor:
        block.zero_grad()
        block(batch).square().sum().backward()
        return flat([p.grad for p in inner.parameters()])

    parts = sum(gradient(one) for one in x.split(1))
    assert torch.allclose(gradient(x), parts, rtol=1e-8, atol=1e-10)


def test_what_a_closed_gate_hides_is_found_when_it_opens() -> None:
    gate = nn.Parameter(torch.zeros((), dtype=torch.float64))
    block = ap.Equilibrium(
        ap.from_function(lambda z, x, g: x - z + g * torch.tanh(z.mean(0)) + z / 9, g=gate)
    )
    x = normal(4, 3)
    block(x).sum().backward()
    with torch.no_grad():
        gate += 0.3
    with pytest.raises(ap.RuleError, match="samples interact"):
        block(x)


def test_one_sample_or_none_tells_nothing_and_other_axes_are_another_question() -> None:
    inner = nn.Linear(4, 4).double()

    def force(z: Tensor, x: Tensor) -> Tensor:
        return x - z + torch.tanh(inner(z) - (z.mean(0) if z.dim() == 3 else 0)) / 3

    block = ap.Equilibrium(ap.from_function(force, inner))
    for shape in [(1, 3, 4)] * 4 + [(5, 4)] * 4 + [(5, 0, 4)] * 4:
        block(torch.randn(*shape, dtype=torch.float64))
    with pytest.raises(ap.RuleError, match="samples interact"):
        block(torch.randn(2, 3, 4, dtype=torch.float64))


def test_a_lost_sample_is_no_sign_of_interaction() -> None:
    block = ap.Equilibrium(as_function(nn.Linear(4, 4)).double(), on_failure="accept")
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1] = math.nan
    block(x).nansum().backward()


# when it is asked


def test_the_question_costs_nothing_once_it_was_answered() -> None:
    calls: list[int] = []
    inner = nn.Linear(4, 4).double()

    def force(z: Tensor, x: Tensor) -> Tensor:
        calls.append(0)
        return x - z + torch.tanh(inner(z)) / 3

    block = ap.Equilibrium(ap.from_function(force, inner), ap.Euler(step=1.0, max_steps=20), EXACT)

    def asked() -> int:
        calls.clear()
        block(normal(3, 4))
        return len(calls) - block.certificate.free_evaluations

    assert [call for call in range(1, 18) if asked()] == [1, 2, 4, 8, 16]
    with torch.no_grad():
        assert not asked()  # where nothing is recorded there is no question


def test_a_stabiliser_does_not_ask_what_the_call_has_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, seeing = [], conduct.seeing
    monkeypatch.setattr(conduct, "seeing", lambda *given: asked.append(0) or seeing(*given))
    block = ap.Equilibrium(as_function(nn.Linear(4, 4).double()), TIGHT, ap.Implicit())
    block(normal(3, 4)).sum().backward()
    assert len(asked) == 1
    hinge = ap.JacobianHinge(target=1e-6, every=1, token_target=None)
    told = hinge.apply(block, hinge.init(torch.Generator()), step=0)
    assert told["jacobian_gain"] > 0 and len(asked) == 1


@pytest.mark.parametrize("kind", ["damped", "gated", "thick"])
def test_closed_forms_are_not_asked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = system(kind, seed=1)
    made = []
    plain = type(s.dynamics).evaluate

    def evaluate(self: Any, z: Tensor, x: Tensor) -> Any:
        made.append(plain(self, z, x))
        made[-1].vjp = None
        return made[-1]

    monkeypatch.setattr(type(s.dynamics), "evaluate", evaluate)
    ap.Equilibrium(s.dynamics)(s.x.requires_grad_())
    assert len(made) == 1


class Named(ap.AbstractDynamics):
    """A force that pickles; `mixing` puts its samples together."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.inner, self.mixing = nn.Linear(4, 4), mixing

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        seen = self.inner(z)
        return x - z + torch.tanh(seen - seen.mean(0) if self.mixing else seen) / 3


@pytest.mark.parametrize("how", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_and_compiled_modules_ask_as_well(how: Any) -> None:
    x, right = torch.randn(3, 4), ap.Equilibrium(Named(mixing=False))
    for _ in range(2):  # never called, and called
        how(right)(x).sum().backward()
        right(x)
    wrong = ap.Equilibrium(Named(mixing=True))
    torch.compiler.reset()
    for block in (how(wrong), torch.compile(wrong, backend="eager")):
        with pytest.raises(ap.RuleError, match="samples interact"):
            block(x)
    torch.compiler.reset()


# and by the contract


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "depends on the others"),
        (nn.BatchNorm1d(4), "in training mode an evaluation of the force changes the buffer"),
        (Counter(), "in evaluation mode an evaluation of the force changes the buffer parts.1.cal"),
    ],
    ids=["mixing", "batch norm", "counter"],
)
def test_the_contract_of_dynamics_finds_it_in_any_mode(
    part: nn.Module, message: str, training: bool
) -> None:
    dynamics = Own(nn.Linear(4, 4), copy.deepcopy(part)).double().train(training)
    before = state(dynamics)
    with pytest.raises(AssertionError, match=message):
        check_dynamics(dynamics, normal(3, 4))
    assert dynamics.training == training and dynamics.parts[1].training == training
    assert still(dynamics, before)


def test_the_contract_of_dynamics_passes_what_keeps_it_with_dropout() -> None:
    dynamics = Own(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.5)).double().eval()
    drawn = torch.get_rng_state()
    check_dynamics(dynamics, torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), drawn)
