"""Stacks of blocks as people write them: time first, overwriting, recurrent, seeing each other."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from systems import Gradients, worst

ESTIMATORS = [ap.AEP(), ap.Implicit(tol=1e-10), ap.AEP(beta=1e-4, tol=1e-9)]


def gradients(model: nn.Module, x: Tensor, weight: Tensor) -> Gradients:
    """Return the gradients by input and parameters of a cost that weighs samples unequally."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    out = model(leaf)
    out = out if isinstance(out, Tensor) else out[0]
    (torch.tanh(out) * weight).sum().backward()
    named = {"x": leaf, **dict(model.named_parameters())}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 8), (4, 4, 8), (1, 3, 8), (3, 1, 8)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_either_layout_of_a_torch_encoder_gets_backprops_gradient(
    batch_first: bool, shape: tuple[int, ...], estimator: ap.AbstractEstimator
) -> None:
    model, x = encoder(batch_first), torch.randn(shape, dtype=torch.float64)
    # weights of very different size, so that samples told apart along time would show
    weight = torch.logspace(-2, 1, shape[0], dtype=torch.float64)[:, None, None]
    wanted = gradients(model, x, weight)
    got = gradients(ap.convert(model, {"layers": estimator}), x, weight)
    assert worst(got, wanted) <= 1e-6
    (equilibrium,) = (e for _, e in ap.equilibria(model))
    assert (
        len(equilibrium.certificate.free_residual) == shape[0 if batch_first else 1] or 1 in shape
    )


def test_the_samples_are_found_after_an_update_however_many_calls_came_before_it() -> None:
    model = encoder(batch_first=False)
    for layer in model.layers:  # time steps do not see each other until the weights have learned
        nn.init.zeros_(layer.self_attn.out_proj.weight)
    x, weight = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    ap.convert(model, {"layers": ap.AEP()})
    for rate in (0.0, 0.1, 0.1):  # a warm-up whose first step has no length
        for _ in range(4):  # accumulated
            gradients(model, x, weight)
            plain = ap.revert(copy.deepcopy(model))
            assert worst(gradients(model, x, weight), gradients(plain, x, weight)) <= 1e-6
        torch.optim.SGD(model.parameters(), rate).step()


def test_an_encoder_in_evaluation_mode_gets_backprops_gradient() -> None:
    model = encoder(batch_first=True).eval()
    x, weight = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    wanted = gradients(model, x, weight)
    fast = torch.backends.mha.get_fastpath_enabled()
    got = gradients(ap.convert(model, {"layers": ap.AEP()}), x, weight)
    assert worst(got, wanted) <= 1e-6
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return torch.tanh(self.inner(h))


@pytest.mark.parametrize("kind", ["counter", "spectral norm"])
def test_a_block_that_changes_its_buffers_is_refused_and_none_has_changed(kind: str) -> None:
    counting = Counting()
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), counting if kind == "counter" else spectral)
    ap.convert(model, {"": ap.AEP()})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ap.RuleError, match="evaluating block 1 changes its buffers"):
        model(torch.randn(3, 4))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.eval()(torch.randn(3, 4)).sum().backward()


def test_asking_who_the_samples_are_keeps_nothing_alive() -> None:
    gc.collect()
    gc.freeze()  # what other tests have left may go at any moment, and is not counted
    model = ap.convert(encoder(batch_first=False), {"layers": ap.AEP()})
    x, weight = torch.randn(2, 5, 3, 8, dtype=torch.float64)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(3):
        gradients(model, x, weight)
    before = alive()
    gradients(model, x, weight)  # the fourth call asks
    assert alive() == before


class Centred(nn.Module):
    """A block in which all samples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.inner(h - h.mean(0)))


class Mean(nn.Module):
    """A level without axes."""

    def forward(self, h: Tensor) -> Tensor:
        return h.square().mean()


@pytest.mark.parametrize(
    "blocks",
    [lambda: [Centred(), Centred(), Centred()], lambda: [nn.Linear(6, 6), nn.Tanh(), Mean()]],
    ids=["seeing each other", "without axes"],
)
def test_what_has_no_samples_is_one_sample_with_the_right_gradient(
    blocks: Callable[[], list[nn.Module]],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*blocks()).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    weight = torch.randn_like(model(x))
    wanted = gradients(model, x, weight)
    assert worst(gradients(ap.convert(model, {"": ap.AEP()}), x, weight), wanted) <= 1e-6
    (equilibrium,) = (e for _, e in ap.equilibria(model))
    assert len(equilibrium.certificate.free_residual) == 1


class AddInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        h += torch.tanh(self.inner(h.clone()))
        return h


class First(nn.Module):
    """A recurrent layer whose block hands on a tuple, and one that does not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.inner(h if isinstance(h, Tensor) else h[0])[0]
        return out


BLOCKS: dict[str, Callable[[], list[nn.Module]]] = {
    "in-place ReLU": lambda: [nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)],
    "in-place first": lambda: [nn.SiLU(inplace=True), nn.Linear(4, 4), nn.Hardtanh(inplace=True)],
    "in-place sum": lambda: [AddInPlace(), AddInPlace(), AddInPlace()],
    "LSTM": lambda: [nn.Linear(4, 4), First(nn.LSTM(4, 4, batch_first=True)), nn.Linear(4, 4)],
    "LSTM last": lambda: [nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)],
}


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_overwrite_or_return_tuples_get_backprops_gradient(
    name: str, precision: torch.dtype
) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*BLOCKS[name]()).to(precision)
    x = torch.randn(2, 5, 4, dtype=precision) + 0.5
    plain = copy.deepcopy(model)
    weight = torch.randn(2, 5, 4, dtype=precision)
    wanted = gradients(nn.Sequential(Copy(), *plain), x, weight)
    wanted = {k if k == "x" else str(int(k[0]) - 1) + k[1:]: g for k, g in wanted.items()}
    before = x.clone()
    ap.convert(model, {"": ap.AEP()})
    for _ in range(2):  # nothing that the first call found out spoils the second
        got = gradients(model, x, weight)
        assert worst(got, wanted) <= (1e-3 if precision is torch.float32 else 1e-6)
    assert torch.equal(x, before)
    again = pickle.loads(pickle.dumps(model))
    assert worst(gradients(again, x, weight), got) == 0


class Copy(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.clone()


def test_convert_takes_solver_and_policy_of_a_stack_and_refuses_them_without_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    ap.convert(model, {"": ap.AEP()}, solver=ap.Euler(step=1.0), on_failure="accept")
    (equilibrium,) = (e for _, e in ap.equilibria(model))
    assert equilibrium.solver == ap.Euler(step=1.0) and equilibrium.on_failure == "accept"
    assert equilibrium.dynamics.phases == "synchronous"
    for options in ({"solver": ap.Euler()}, {"on_failure": "accept"}):
        with pytest.raises(ap.ConfigError, match="name one with its estimator"):
            ap.convert(nn.Linear(4, 4), ap.FeedbackAlignment(), **options)
    with pytest.raises(ap.ConfigError, match="batch_axis is for broadcast rules"):
        ap.convert(nn.Sequential(nn.Linear(4, 4)), {"": ap.AEP()}, batch_axis=0)
