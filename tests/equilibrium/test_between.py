"""What changes between a call and its backward pass: put back, refused, or none of its business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap
from systems import EXACT, TIGHT, error, flat, randn

X, W = randn(3, 6, seed=1), randn(3, 6, seed=2)
HINGE = ap.JacobianHinge(target=1e-3, every=1)


def linear(width: int = 6) -> nn.Linear:
    return nn.Linear(width, width).double()


def layer() -> nn.Module:
    return nn.Sequential(linear(), nn.Tanh(), nn.Dropout(0.4))


def own(estimator: ap.AbstractEstimator) -> nn.Module:
    inner = layer()
    return ap.Equilibrium(ap.from_function(lambda z, x: x - z + inner(z), inner), TIGHT, estimator)


def stack(estimator: ap.AbstractEstimator) -> nn.Module:
    return ap.Equilibrium(ap.Layered([layer() for _ in range(4)]), TIGHT, estimator)


def converted(estimator: ap.AbstractEstimator) -> nn.Module:
    return ap.convert(nn.Sequential(*[layer() for _ in range(4)]), {"": estimator})


def gradient(
    build: Callable[[ap.AbstractEstimator], nn.Module],
    estimator: ap.AbstractEstimator,
    between: Callable[[nn.Module], object],
) -> Tensor:
    torch.manual_seed(0)
    block, x = build(estimator), X.clone().requires_grad_()
    z = block(x)
    between(block)
    modes = [m.training for m in block.modules()]
    found = flat(torch.autograd.grad((W * z).sum(), [x, *block.parameters()]))
    assert [m.training for m in block.modules()] == modes  # as whoever set them left them
    return found


@pytest.mark.parametrize("estimator", [ap.AEP(), ap.EP(), ap.Implicit(), ap.OneStep(k=3)])
@pytest.mark.parametrize("build", [own, stack, converted])
def test_eval_before_the_backward_pass_changes_no_gradient(
    build: Callable[[ap.AbstractEstimator], nn.Module], estimator: ap.AbstractEstimator
) -> None:
    wanted = gradient(build, estimator, lambda block: None)
    assert torch.equal(gradient(build, estimator, nn.Module.eval), wanted)


def test_hinge_and_spectra_measure_in_the_mode_of_the_call() -> None:
    def measured(between: Callable[[nn.Module], object]) -> list[Tensor]:
        torch.manual_seed(0)
        block = own(EXACT)
        block(X).sum().backward()
        between(block)
        found = [ap.spectrum(block.certificate).abscissa, ap.numerical_abscissa(block.certificate)]
        block.zero_grad()
        HINGE.apply(block, HINGE.init(torch.Generator().manual_seed(0)), 0)
        return [*found, *(p.grad for p in block.parameters())]

    for found, wanted in zip(measured(nn.Module.eval), measured(lambda block: None), strict=True):
        assert torch.equal(found, wanted) and wanted.any()


class Masked(ap.AbstractDynamics):
    """A force with tensors of every kind beside the state; its arguments scale and shift it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mask = linear(), torch.ones(6, dtype=torch.float64)
        self.register_buffer("shift", torch.zeros(6, dtype=torch.float64))
        self.seen: Tensor | None = None

    def forward(
        self,
        z: Tensor,
        x: Tensor,
        scale: Tensor | float = 1.0,
        more: dict[str, Tensor] | None = None,
    ) -> Tensor:
        self.seen = z.detach()  # which each evaluation puts in anew
        added = x if more is None else x + more["added"]
        return scale * torch.tanh(self.linear(z) * self.mask + added + self.shift) / 2 - z


def masked() -> tuple[Masked, ap.Equilibrium]:
    torch.manual_seed(0)
    dynamics = Masked()
    return dynamics, ap.Equilibrium(dynamics, TIGHT, EXACT)


@pytest.mark.parametrize("name", ["mask", "shift"])
def test_a_tensor_under_the_same_name_is_that_of_each_call(name: str) -> None:
    """Also where one is given before the backward pass of another; plain models record the same."""
    parts, (dynamics, block) = [], masked()
    for value in (randn(6, seed=3), randn(6, seed=4)):
        setattr(dynamics, name, value)
        parts.append(flat(torch.autograd.grad((W * block(X)).sum(), list(block.parameters()))))
    total = []
    for value in (randn(6, seed=3), randn(6, seed=4)):
        setattr(dynamics, name, value)
        total.append((W * block(X)).sum())
    delattr(dynamics, name)
    joint = flat(torch.autograd.grad(total[0] + total[1], list(block.parameters())))
    assert error(joint, parts[0] + parts[1]) <= 1e-12
    assert not hasattr(dynamics, name)


SCALE, ADDED = randn(6, seed=5), randn(6, seed=6)
WRITTEN: dict[str, Callable[[Masked, Tensor, Tensor, Tensor], Tensor]] = {
    "the input": lambda dynamics, x, scale, added: x,
    "further argument 1": lambda dynamics, x, scale, added: scale,
    "the argument more": lambda dynamics, x, scale, added: added,
    r"\(linear\.bias\)": lambda dynamics, x, scale, added: dynamics.linear.bias,
    r"Masked\.mask": lambda dynamics, x, scale, added: dynamics.mask,
    r"Masked\.shift": lambda dynamics, x, scale, added: dynamics.shift,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_over_before_the_backward_pass_is_refused_by_its_name(name: str) -> None:
    dynamics, block = masked()
    given = X.clone(), SCALE.clone(), ADDED.clone()
    loss = block(given[0], given[1], more={"added": given[2]}).sum()
    with torch.no_grad():
        WRITTEN[name](dynamics, *given).add_(0.7)
    with pytest.raises(
        ap.RuleError, match=name + ".*changed in place after|after.*" + name
    ) as told:
        loss.backward()
    assert "\n" not in str(told.value)
    assert all(p.grad is None for p in block.parameters())


def test_a_stack_whose_input_or_mask_is_written_over_is_refused() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, h: Tensor, added: Tensor) -> Tensor:
            return torch.tanh(self.linear(h) + added)

    for build in (
        lambda: ap.Equilibrium(ap.Layered([Added(), Added()])),
        lambda: ap.convert(Twice([Added(), Added()]), {"blocks": ap.AEP()}),
    ):
        for written in (0, 1):
            block, given = build(), (X.clone(), ADDED.clone())
            loss = block(*given).sum()
            given[written].add_(1)
            with pytest.raises(ap.RuleError, match="changed in place after the forward pass"):
                loss.backward()


class Twice(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, h: Tensor, added: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, added)
        return h


def test_a_hinge_and_spectra_refuse_an_input_that_was_written_over() -> None:
    _, block = masked()
    x = X.clone()
    block(x).sum().backward()
    x.zero_()
    for ask in (
        lambda: ap.spectrum(block.certificate),
        lambda: ap.numerical_abscissa(block.certificate),
        lambda: HINGE.apply(block, HINGE.init(torch.Generator()), 0),
    ):
        with pytest.raises(ap.RuleError, match="the input changed in place after the forward pass"):
            ask()


def test_what_plain_models_may_do_goes_on_working() -> None:
    dynamics, block = masked()
    parameters = list(block.parameters())
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    x = X.clone()
    loss = (W * block(x)).sum()
    once = flat(torch.autograd.grad(loss, parameters, retain_graph=True))
    assert torch.equal(flat(torch.autograd.grad(loss, parameters, retain_graph=True)), once)
    again = (W * checkpoint(block, x, use_reentrant=False)).sum()
    assert torch.equal(flat(torch.autograd.grad(again, parameters)), once)
    (loss + (W * block(x)).sum()).backward()  # two calls, one backward pass
    assert error(flat([p.grad for p in parameters]), 2 * once) <= 1e-12
    optimiser.step()
    ap.spectrum(block.certificate)  # of the state of that call, by the weights of now
    x.copy_(randn(3, 6, seed=7))
    dynamics.mask.mul_(0.5)
    dynamics.shift.add_(1)
    (W * block(x)).sum().backward()  # and all of it is new
    with torch.inference_mode():
        inferred = x.clone()
    block(inferred)


class Counter(nn.Module):
    """A module that counts its evaluations, the recorded ones too, and keeps the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = linear(), torch.zeros(())
        self.tally, self.recorded = torch.zeros(()), torch.zeros(())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.count, self.last = self.count + 1, z
        self.tally.add_(1)
        if torch.is_grad_enabled():
            self.recorded.add_(1)
        return torch.tanh(self.linear(z)) / 2


def test_what_the_force_itself_puts_in_anew_is_left_to_it() -> None:
    inner = Counter()
    block = ap.Equilibrium(ap.from_function(lambda z, x: x - z + inner(z), inner), TIGHT, EXACT)
    loss = block(X).sum()
    block(X)
    before = int(inner.count)
    loss.backward()
    assert int(inner.count) == int(inner.tally) > before > int(inner.recorded) > 1


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_buffers_that_ddp_writes_anew_are_the_same_ones() -> None:
    dynamics, block = masked()
    parallel = nn.parallel.DistributedDataParallel(block)
    losses = [(W * parallel(X)).sum() for _ in range(2)]
    dynamics.shift.add_(0)  # as it does on several ranks
    sum(losses).backward()
    assert all(p.grad.any() for p in block.parameters())


def test_a_checkpoint_around_a_force_of_ones_own_changes_no_step() -> None:
    """What is asked beside the forward pass in some steps alone, a checkpoint does not count."""

    def weights(*, checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        W = nn.Linear(6, 6)
        block = ap.Equilibrium(ap.from_function(lambda z, x: x - z + torch.tanh(W(z)) / 2, W))
        optimiser, seen = torch.optim.SGD(block.parameters(), lr=1e-2), []
        for seed in range(20):
            x = randn(4, 6, seed=seed).float().requires_grad_()
            z = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            optimiser.zero_grad()
            z.square().sum().backward()
            optimiser.step()
            seen.append(W.weight.detach().clone())
        return seen

    pairs = zip(weights(checkpointed=True), weights(checkpointed=False), strict=True)
    assert all(torch.equal(own, wanted) for own, wanted in pairs)
