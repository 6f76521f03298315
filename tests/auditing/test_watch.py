"""What is read of each weight while gradients are made, whoever makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import altprop as ap
from altprop import Read

x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 7))


def seen(model: nn.Module, step: Callable[[], Any]) -> dict[str, Read]:
    with ap.watch(model) as watched:
        step()
    return {name: reading.how for name, reading in watched.items()}


def backward(model: nn.Module, given: Tensor = x) -> Callable[[], Any]:
    return lambda: model(given).square().sum().backward()


def test_backprop_carries_every_weight_but_the_first_and_reads_a_gain_elementwise() -> None:
    model = mlp()
    found = seen(model, backward(model))
    assert found.pop("3.weight") is Read.MATRIX and found.pop("1.weight") is Read.ELEMENTWISE
    assert set(found.values()) == {Read.NOT}
    with ap.watch(model) as watched:
        model(x.clone().requires_grad_()).sum().backward()
    assert watched["0.weight"].how is Read.MATRIX and watched["0.weight"].operations["mm"] == 1
    assert "3.weight  carried as a matrix (mm × 1)" in str(watched)


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        (ap.FeedbackAlignment(), Read.NOT),
        (ap.KolenPollack(), Read.NOT),
        (ap.SignSymmetry(), Read.SIGN),
        (ap.Backprop(), Read.MATRIX),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rules_read_what_they_say(rule: Any, how: Read) -> None:
    model = ap.convert(mlp(), rule)
    assert seen(model, backward(model))["3.weight"] is how


def test_nothing_is_read_outside_and_nothing_is_left_behind() -> None:
    model = mlp()
    backward(model)()
    with ap.watch(model) as watched:
        model(x)
    backward(model)()
    assert {r.how for r in watched.values()} == {Read.NOT}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Made(nn.Module):
    """A linear map whose weight is made of its parameter first."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.make = make

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.make(self.weight).T


MASK = (torch.rand(5, 8) > 0.3).float()
TURN = torch.linalg.qr(torch.randn(8, 8))[0]


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda w: w, Read.MATRIX),
        (lambda w: w.double().float(), Read.MATRIX),
        (lambda w: torch.cat([w[2:], w[:2]]), Read.MATRIX),
        (lambda w: w * MASK, Read.MATRIX),
        (lambda w: w + torch.randn(5, 8), Read.MATRIX),
        (lambda w: w / w.norm(), Read.MATRIX),
        (lambda w: w[torch.tensor([3, 1, 4, 0, 2])], Read.MATRIX),
        (lambda w: w @ TURN, Read.MATRIX),
        (lambda w: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127), Read.MATRIX),
        (lambda w: w.detach().sign(), Read.SIGN),
        (lambda w: (w.detach() > 0).float() - 0.5, Read.SIGN),
        (lambda w: w.detach().norm(dim=1, keepdim=True).expand(5, 8), Read.NORM),
        (lambda w: torch.ones_like(w), Read.NOT),
    ],
    ids="itself cast cut masked noisy normed rows turned quantised sign above_zero norm "
    "like".split(),
)
def test_what_is_made_of_a_weight_is_that_weight(
    make: Callable[[Tensor], Tensor], how: Read
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Made(make))
    assert seen(model, backward(model))["1.weight"] is how


def test_a_weight_that_is_picked_for_each_sample_is_carried() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 9, 8))

        def forward(self, h: Tensor) -> Tensor:
            best = h[:, :4].argmax(1)  # by what the sample is
            return torch.bmm(self.w[best], h[:, :, None])[:, :, 0]

    model = nn.Sequential(nn.Linear(8, 8), Experts())
    assert seen(model, backward(model))["1.w"] is Read.MATRIX


def test_a_weight_that_a_fixed_part_is_joined_to_is_carried() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8))
            self.register_buffer("fixed", torch.randn(2, 8))

        def forward(self, h: Tensor) -> Tensor:
            return h @ torch.cat([self.w, self.fixed]).T

    model = nn.Sequential(nn.Linear(8, 8), Joined())
    assert seen(model, backward(model))["1.w"] is Read.MATRIX


def test_memory_that_once_held_a_weight_holds_what_was_written_over_it() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 7))
    scratch = torch.empty(7, 9)
    for write, how in ((lambda: scratch.normal_(), Read.NOT), (lambda: None, Read.MATRIX)):

        def step(write: Callable[[], Any] = write) -> None:
            with torch.no_grad():
                scratch.copy_(model[1].weight)
                write()
                torch.ones(3, 7) @ scratch

        assert seen(model, step)["1.weight"] is how


def test_what_is_no_product_and_no_backward_reads_nothing() -> None:
    model, old = mlp(), torch.zeros(7, 9)
    names = {n: p.detach() for n, p in model.named_parameters()}
    ways = {n: torch.randn_like(p) for n, p in names.items()}

    def step() -> None:
        torch.allclose(model[3].weight, old)
        nn.functional.mse_loss(model[3].weight, old)
        torch.dist(model[3].weight, old)
        torch.stack([model[3].weight.detach(), old])
        torch.func.jvp(lambda p: torch.func.functional_call(model, p, (x,)), (names,), (ways,))

    assert set(seen(model, step).values()) == {Read.NOT}


def test_parameters_that_share_memory_are_told_apart() -> None:
    flat, model = torch.randn(2, 8, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))
    for layer, part in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(part)
    found = seen(model, backward(model))
    assert found["0.weight"] is Read.NOT and found["1.weight"] is Read.MATRIX


def test_a_product_that_is_written_elementwise_is_a_product() -> None:
    class Disguised(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return h @ w.T

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            (w,) = ctx.saved_tensors
            return (g.unsqueeze(2) * w).sum(1), None

    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return Disguised.apply(input, self.weight)

    model = nn.Sequential(nn.Linear(8, 8), Layer(8, 5, bias=False))
    assert seen(model, backward(model))["1.weight"] is Read.MATRIX


def test_a_feedback_that_is_a_copy_of_the_weight_is_that_weight() -> None:
    model = ap.convert(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8)), ap.FeedbackAlignment())

    def step() -> None:
        with torch.no_grad():
            model[1].B.copy_(model[1].weight)
        backward(model)()

    assert seen(model, step)["1.weight"] is Read.MATRIX


def test_gradients_that_are_made_by_hand_are_seen() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 7))

    def step() -> None:
        with torch.no_grad():
            h = model[0](x)
            e = model[1](h)
            model[1].weight.grad = e.T @ h
            model[0].weight.grad = (e @ model[1].weight).T @ x

    assert seen(model, step) == {
        "0.weight": Read.NOT, "0.bias": Read.NOT, "1.weight": Read.MATRIX, "1.bias": Read.NOT,
    }  # fmt: skip


def test_an_optimisers_step_is_no_reading() -> None:
    model = nn.Sequential(nn.Linear(8, 9))
    for optimiser in (torch.optim.SGD, torch.optim.AdamW):
        made = optimiser(model.parameters(), lr=0.1, weight_decay=0.1)

        def step(made: torch.optim.Optimizer = made) -> None:
            backward(model)()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            made.step()

        assert set(seen(model, step).values()) == {Read.NOT}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_anew_is_a_forward_pass(reentrant: bool) -> None:
    first, last = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = nn.ModuleList([first, last])

    def step(model: nn.Module = model, wrapped: bool = True) -> None:
        h = first(x).detach().requires_grad_()
        out = checkpoint(last, h, use_reentrant=reentrant) if wrapped else last(h)
        assert isinstance(out, Tensor)
        out.square().sum().backward()

    with ap.watch(model) as watched:
        step()
    with ap.watch(model) as plain:
        step(wrapped=False)
    assert dict(watched) == dict(plain)
    assert watched["1.2.weight"].how is Read.MATRIX


def test_gradients_of_gradients_are_seen() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 1))

    def step() -> None:
        given = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(given).sum(), given, create_graph=True)
        slope.square().sum().backward()

    found = seen(model, step)
    assert found["0.weight"] is found["2.weight"] is Read.MATRIX


def test_a_compiled_model_shows_the_same() -> None:
    model = mlp()
    wanted = seen(model, backward(model))
    compiled = torch.compile(model, backend="aot_eager")
    backward(compiled)()
    assert seen(model, backward(compiled)) == wanted


@pytest.mark.parametrize("estimator", [ap.AEP(), ap.EP(), ap.Implicit()], ids=repr)
def test_an_equilibriums_phases_evaluate_the_force_with_every_weight(estimator: Any) -> None:
    block = ap.Equilibrium(ap.DampedAttention(8, heads=2), estimator=estimator)
    found = seen(block, backward(block, torch.randn(2, 5, 8)))
    assert set(found.values()) == {Read.MATRIX}


class OwnProduct(torch.autograd.Function):
    """A product that sends its error through another matrix than its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, feedback = ctx.saved_tensors
        return grads[0] @ feedback, grads[0].mT @ x, None


class Rewired(nn.Module):
    """Two products of one's own, of which a method, and no module, may be checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.w1, self.w2 = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.B = nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def hidden(self, x: Tensor) -> Tensor:
        return OwnProduct.apply(x, self.w1, self.B).tanh()  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            h = self.hidden(x)
        else:
            h = checkpoint(self.hidden, x, use_reentrant=self.reentrant)
        return OwnProduct.apply(h, self.w2, self.B)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_checkpointed_method_reads_what_it_reads_uncheckpointed(reentrant: bool | None) -> None:
    model = Rewired(reentrant)
    given = torch.randn(3, 4, requires_grad=True)
    found = seen(model, backward(model, given))
    assert found == {"w1": Read.NOT, "w2": Read.NOT, "B": Read.MATRIX}


def fed_by(write: Callable[[Rewired], Any]) -> dict[str, Read]:
    """Return what a step reads of which the feedback was written first."""
    model = Rewired(None)

    def step() -> None:
        with torch.no_grad():
            write(model)
        model(torch.randn(3, 4, requires_grad=True)).square().sum().backward()

    return seen(model, step)


@pytest.mark.parametrize(
    "write",
    [
        lambda b, w: b.copy_(w),
        lambda b, w: b.lerp_(w, 1.0),
        lambda b, w: b.mul_(0).add_(w),
        lambda b, w: torch.add(w, 0.0, out=b),
        lambda b, w: torch._foreach_copy_([b], [w]),
        lambda b, w: torch._foreach_lerp_([b], [w], 1.0),
    ],
)
def test_a_feedback_that_is_a_parameter_holds_what_was_written_into_it(write: Any) -> None:
    found = fed_by(lambda model: write(model.B, model.w2))
    assert found["w2"] is Read.MATRIX and found["w1"] is Read.NOT


def test_lists_are_followed_member_by_member() -> None:
    found = fed_by(lambda m: m.B.copy_(torch._foreach_sign([m.w1, m.w2])[1]))
    assert found["w2"] is Read.SIGN and found["w1"] is Read.NOT


def test_a_parameter_that_was_put_into_other_memory_is_followed_there() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))

    def steps() -> None:
        for _ in range(4):
            gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.data = torch.tensor((p - 0.1 * g).tolist())  # of which nothing else tells

    with ap.watch(model) as found:
        steps()
    assert {n: r.how for n, r in found.items() if r.how} == {"2.weight": Read.MATRIX}
    assert found["2.weight"].operations == {"mm": 4}
