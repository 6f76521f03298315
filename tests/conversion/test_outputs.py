"""What tapped modules put out: one tensor hears the error, and nothing else gets past the tap.

With a feedback of zeros, no parameter below the last tap may receive anything.
"""

from __future__ import annotations

import warnings
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, gradients

Pair = namedtuple("Pair", "hidden extra")
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
RULES = [ap.DirectFeedback("block", std=0.5), ap.GrAPE(std=0.5), ap.BlockDirectFeedback(std=0.5)]
WRAPS = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, None),
    "list": lambda h: [h, 1],
    "named tuple": lambda h: Pair(h, 0),
    "dict": lambda h: {"cache": None, "hidden": h},
    "twice": lambda h: (h, h),
    "behind a flag": lambda h: (True, h),
    "beside a cache": lambda h: (h, (h.detach(), h.detach())),
}


def hidden(out: Any) -> Tensor:
    if isinstance(out, dict):
        out = tuple(out.values())
    return next(v for v in out if isinstance(v, Tensor)) if isinstance(out, tuple | list) else out


class Block(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.map, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, h: Tensor) -> Any:
        return self.wrap(torch.tanh(self.map(h)))


class Net(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block(wrap) for _ in range(2))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            out = block(h)
            assert type(out) is type(block.wrap(h))
            h = hidden(out)
        logits: Tensor = self.head(h)
        return logits


def net(wrap: Any, rule: ap.AbstractRule) -> Net:
    torch.manual_seed(0)
    return ap.convert(Net(wrap).double(), rule, output="head", batch_axis=0)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_the_first_tensor_is_the_tap_whatever_holds_it(wrap: Any, rule: ap.AbstractRule) -> None:
    want = gradients(net(WRAPS["tensor"], rule), X)
    assert_equal(gradients(net(wrap, rule), X), want)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_outputs_of_hugging_face_hold_the_tap_too(rule: ap.AbstractRule) -> None:
    kind = pytest.importorskip("transformers.modeling_outputs").BaseModelOutput
    want = gradients(net(WRAPS["tensor"], rule), X)
    assert_equal(gradients(net(lambda h: kind(last_hidden_state=h), rule), X), want)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_output_without_a_tensor_is_refused_in_one_line(rule: ap.AbstractRule) -> None:
    class Held:
        pass

    def wrap(h: Tensor) -> Any:
        held = Held()
        held.h = h  # type: ignore[attr-defined]
        return held

    with pytest.raises(ap.RuleError, match=r" returned a Held without a tensor .* return a tens"):
        net(wrap, rule)(X)


class Residual(nn.Module):
    """A block of `(hidden, residual)`, whose residual goes around every hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, h: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = h + residual
        return self.map(torch.tanh(residual)), residual


class Around(nn.Module):
    def __init__(self, detach: bool = False) -> None:
        super().__init__()
        self.embed, self.detach = nn.Linear(4, 4), detach
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = residual = self.embed(x)
        for block in self.blocks:
            h, residual = block(h, residual)
            residual = residual.detach() if self.detach else residual
        logits: Tensor = self.head(h + residual)
        return logits


def test_no_gradient_gets_past_a_tap_by_another_output() -> None:
    torch.manual_seed(0)
    model = ap.convert(Around().double(), ap.DirectFeedback("block"), output="head")
    with pytest.raises(ap.RuleError, match=r"blocks\.0 is tapped .* gradient reached another one"):
        gradients(model, X)
    model.detach = True
    with torch.no_grad():
        model.B_dfa_shared.zero_()
    assert all(
        not g.any() for name, g in gradients(model, X).items() if not name.startswith("head")
    )


def test_a_calibration_lets_the_exact_gradient_through_every_output() -> None:
    torch.manual_seed(0)
    rule = ap.DirectFeedback("block", calibrate_every=2)
    model = Around(detach=True).double()
    ap.convert(model, rule, output="head")
    gradients(model, X)
    model.detach = False
    got = gradients(model, X)
    assert_equal(got, gradients(ap.revert(model), X))


def test_an_output_that_only_reports_may_carry_a_gradient() -> None:
    rule = RULES[0]
    want = gradients(net(WRAPS["tensor"], rule), X)
    assert_equal(gradients(net(lambda h: (h, h.softmax(-1)), rule), X), want)
    model = net(lambda h: (h, [h.softmax(-1)]), rule)
    assert_equal(gradients(model, X), want)


class Positions(nn.Module):
    """A block that makes, of a parameter of its own, what later blocks add, or is given it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.linspace(-1, 1, 4)) if first else None

    def forward(self, h: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if bias is None:
            assert self.table is not None
            bias = self.table.tanh()
        return torch.tanh(self.map(h) + bias), bias * 2.0


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Positions(i == 0) for i in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, bias = self.embed(x), None
        for block in self.blocks:
            h, bias = block(h, bias)
        logits: Tensor = self.head(h)
        return logits


def test_what_depends_on_a_blocks_own_parameters_alone_may_be_handed_on() -> None:
    torch.manual_seed(0)
    model = ap.convert(Biased().double(), ap.DirectFeedback("block", std=0.5), output="head")
    got = gradients(model, X)
    params = dict(model.named_parameters())
    B, leaf = model.B_dfa_shared.detach(), params["blocks.0.table"]
    h, total, bias = model.embed(X), torch.zeros(()), leaf.tanh()
    logits = model(X).detach().requires_grad_()
    (e,) = torch.autograd.grad(logits.tanh().square().sum(), logits)
    for block in model.blocks:  # every block for itself, and the table for all
        h = torch.tanh(torch.nn.functional.linear(h, *block.map.parameters()) + bias)
        total, h, bias = total + (h * (e @ B.t())).sum(), h.detach(), bias * 2.0
    (want,) = torch.autograd.grad(total, leaf)
    assert_equal({"table": got["blocks.0.table"]}, {"table": want})


class Masked(nn.Module):
    """A model that changes its logits, and what its blocks return, in place or out of place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
            if self.in_place:
                h += 1.0
            else:
                h = h + 1.0
        logits: Tensor = self.head(h)
        if self.in_place:
            logits[..., 0] = -3.0
            return logits
        return torch.cat([torch.full_like(logits[..., :1], -3.0), logits[..., 1:]], -1)


@pytest.mark.parametrize(
    "rule", [*RULES, ap.DirectFeedback(std=0.5), ap.DirectFeedback(error="head_input")], ids=str
)
def test_what_is_changed_in_place_has_the_gradient_of_what_is_not(rule: ap.AbstractRule) -> None:
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = ap.convert(Masked(in_place).double(), rule, output="head")
        found.append(gradients(model, X))
    assert_equal(*found)


def test_logits_changed_in_place_compile_and_transform() -> None:
    torch.manual_seed(0)
    model = ap.convert(Masked(True).double(), ap.DirectFeedback(std=0.5), output="head")
    want = gradients(model, X)
    torch._dynamo.reset()
    with warnings.catch_warnings():  # torch's compiler warns of what it does itself
        warnings.simplefilter("ignore")
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = gradients(run, X)
    assert_equal({n.removeprefix("_orig_mod."): g for n, g in got.items()}, want)
    torch._dynamo.reset()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (X,)).tanh().square().sum()

    assert_equal(torch.func.grad(loss)(parameters), want)
