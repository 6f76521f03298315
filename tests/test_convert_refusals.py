"""What convert cannot take: said in one line, and nothing of a failed convert is left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import altprop as ap
from altprop.testing.rules import TinyModel

FA = ap.FeedbackAlignment()
BROADCAST = [
    ap.DirectFeedback(),
    ap.DirectFeedback(granularity="block", feedback="independent"),
    ap.DirectFeedback(granularity="sublayer"),
    ap.BlockDirectFeedback(),
    ap.GrAPE(),
]


def trace(model: nn.Module) -> list[object]:
    """Return all that convert could change, down to the bits and the identity of tensors."""
    found: list[object] = []
    for path, m in model.named_modules():
        tensors = {**m._parameters, **m._buffers}
        bits = [
            None if t is None or t.is_meta or is_lazy(t) else t.tolist() for t in tensors.values()
        ]
        grads = [None if t is None else t.requires_grad for t in tensors.values()]
        plain = {k: v for k, v in m.__dict__.items() if isinstance(v, (bool, int, str))}
        found.append((path, type(m), list(m.__dict__), list(m._buffers), list(m._parameters)))
        found.append((list(map(id, tensors.values())), bits, grads, plain))
    return found


def refused(
    model: nn.Module, rule: Any, error: type[BaseException] = ap.RuleError, **options: Any
) -> str:
    """Convert in vain, see that nothing was changed, and return what was said."""
    before = trace(model)
    with pytest.raises(error) as caught:
        ap.convert(model, rule, **options)
    assert trace(model) == before
    return str(caught.value)


# Layers of another kind


class Own(nn.Module):
    """A layer of the user's, which multiplies by a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: nn.Conv1d(3, 4, 1),
    "Conv2d": lambda: nn.Conv2d(3, 4, 1),
    "Conv3d": lambda: nn.Conv3d(3, 4, 1),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(3, 4, 1),
    "LazyConv2d": lambda: nn.LazyConv2d(4, 1),
    "ParametrizedConv1d": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 1)),
    "LSTM": lambda: nn.LSTM(3, 4),
    "GRU": lambda: nn.GRU(3, 4),
    "RNN": lambda: nn.RNN(3, 4),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "Bilinear": lambda: nn.Bilinear(3, 3, 4),
    "Own": Own,
}


def beside(other: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"part": nn.Sequential(other), "head": nn.Linear(3, 2)})


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("rule", [FA, ap.KolenPollack(), ap.DirectFeedback()], ids=str)
def test_a_bare_rule_says_once_which_layers_it_leaves_on_backprop(
    rule: ap.AbstractRule, kind: str
) -> None:
    options = {"output": "head"} if isinstance(rule, ap.AbstractBroadcast) else {}
    model = beside(OTHERS[kind]())
    model["more"] = nn.Linear(2, 2)
    with pytest.warns(ap.RuleWarning) as caught:
        ap.convert(model, rule, **options)
    (warning,) = caught
    said = str(warning.message)
    assert f"part.0 ({kind})" in said and "\n" not in said and "head" not in said
    assert warning.filename == __file__
    # what it says to write says that this is meant
    code = said.partition("if that is meant, say so by a pattern: ")[2]
    again = beside(OTHERS[kind]())
    again["more"] = nn.Linear(2, 2)
    names = {type(rule).__name__: type(rule), "convert": lambda m, r: ap.convert(m, r, **options)}
    exec(code, {"model": again, **names})
    assert type(again["more"]) is type(model["more"]) is not nn.Linear


@pytest.mark.parametrize(
    "quiet",
    [
        nn.Embedding(3, 4),
        nn.EmbeddingBag(3, 4),
        nn.LayerNorm((2, 3)),
        nn.RMSNorm((2, 3)),
        nn.BatchNorm2d(3),
        nn.GroupNorm(1, 3),
        nn.PReLU(3),
        nn.ParameterDict({"position": torch.zeros(4, 3)}),
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(4, 2, 8),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_multiplies_by_no_matrix_of_another_kind_is_no_reason_to_warn(
    quiet: nn.Module,
) -> None:
    ap.convert(beside(quiet), FA)


def test_no_warning_where_patterns_chose_or_nothing_was_to_be_left() -> None:
    conv = nn.Conv1d(3, 4, 1)
    ap.convert(beside(conv), {"head": FA})
    ap.convert(beside(conv), {"*": FA})
    ap.convert(beside(conv), ap.Backprop())


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x.transpose(1, 2)).transpose(1, 2))


def test_a_broadcast_rule_warns_of_what_it_would_have_tapped() -> None:
    def model() -> nn.ModuleDict:
        blocks = nn.ModuleList(ConvBlock() for _ in range(2))
        stem = nn.Conv1d(4, 4, 1)
        return nn.ModuleDict({"stem": stem, "blocks": blocks, "head": nn.Linear(4, 2)})

    whole = ap.DirectFeedback(granularity="block")  # ordinary backprop inside blocks is its way
    ap.convert(model(), whole, output="head")
    with pytest.warns(ap.RuleWarning) as caught:
        ap.convert(model(), ap.BlockDirectFeedback(), output="head")
    (warning,) = caught
    assert "blocks.0.conv (Conv1d), blocks.1.conv (Conv1d);" in str(warning.message)
    with pytest.warns(ap.RuleWarning, match=r"stem \(Conv1d\), blocks.0.conv"):
        ap.convert(model(), ap.DirectFeedback(), output="head")


def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was() -> None:
    model = beside(nn.ModuleList(nn.Conv1d(3, 4, 1) for _ in range(9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = refused(model, FA, ap.RuleWarning)
    assert "part.0.4 (Conv1d) and 4 more; if that is meant" in line


# Weights without a shape or values


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("rule", [FA, {"0": FA}, {"0": ap.KolenPollack(), "*": FA}], ids=str)
def test_a_lazy_map_is_refused_until_a_batch_has_run(rule: Any) -> None:
    model = lazy()
    (line,) = refused(model, rule).splitlines()[1:]
    assert line.startswith("  - 0: lazy, without a shape yet: run one batch")
    model(torch.randn(2, 5))
    ap.convert(model, rule)
    assert model[0].B.shape == (8, 5)


@pytest.mark.parametrize("rule", BROADCAST, ids=str)
@pytest.mark.parametrize("place", ["blocks.1.second.down", "head"])
def test_a_lazy_map_is_refused_by_every_broadcast_rule_that_needs_it(
    rule: ap.AbstractRule, place: str
) -> None:
    model = TinyModel()
    above, _, name = place.rpartition(".")
    setattr(model.get_submodule(above), name, nn.LazyLinear(7 if place == "head" else 8))
    assert "lazy, without a shape yet: run one batch" in refused(model, rule, output="head")
    model(torch.zeros(2, 3, dtype=torch.long))
    ap.convert(model, rule, output="head")


def test_a_lazy_module_outside_every_pattern_is_no_matter() -> None:
    model = lazy()
    model.insert(0, nn.LazyConv1d(4, 1))
    ap.convert(model, {"3": FA})
    x = torch.randn(2, 5, 6)
    model(x).sum().backward()
    assert type(model[0]) is nn.Conv1d and type(model[1]) is nn.Linear
    assert model[3].B.shape == (3, 8)
    ap.revert(model)


@pytest.mark.parametrize("rule", [FA, ap.KolenPollack(), *BROADCAST], ids=str)
def test_a_model_on_the_meta_device_is_refused_in_few_lines_and_converts_once_it_has_values(
    rule: ap.AbstractRule,
) -> None:
    with torch.device("meta"):
        model = TinyModel()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ap.RuleError) as caught:
        ap.convert(model, rule, output="head")
    head, *lines = str(caught.value).splitlines()
    assert "nothing was changed" in head and 1 <= len(lines) <= 3
    for line in lines:
        assert "on the meta device, without values: materialise the model, then convert" in line
    assert [type(m) for m in model.modules()] == before
    model.to_empty(device="cpu")
    twin = TinyModel()
    model.load_state_dict(twin.state_dict())
    ap.convert(model, rule, output="head")
    ap.convert(twin, rule, output="head")
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("kdim", [None, 3])
def test_attention_on_the_meta_device_is_refused(kdim: int | None) -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2, kdim=kdim, device="meta"), nn.Linear(4, 2))
    said = refused(model, FA)
    assert "on the meta device, without values" in said
    assert ("0.in_proj" if kdim is None else "0.q_proj, 0.k_proj, 0.v_proj, 0.out_proj") in said
    ap.convert(model, {"1": FA})  # what lies elsewhere is no matter


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_are_refused_in_one_line(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2))
    assert "0: its weight is complex" in refused(model, FA)
    assert "in_proj: its weight is complex" in refused(nn.MultiheadAttention(4, 2, dtype=dtype), FA)
    ap.convert(model, {"0": ap.Backprop(), "*": FA})
    late = ap.convert(nn.Linear(3, 4), FA)
    late.to(dtype)
    with pytest.raises(ap.RuleError, match="for real numbers"):
        late(torch.randn(2, 3, dtype=dtype))
    with pytest.raises(ap.ConfigError, match="write method='bp'"):
        ap.LocalLinear(3, 4, method="fa", dtype=dtype)
    ap.LocalLinear(3, 4, dtype=dtype)


# Failures while the model is being changed


class Stop(BaseException):
    """Something that no `except Exception` catches, such as Ctrl-C."""


def failing(base: type[Any]) -> type[Any]:
    """Return a rule like `base` whose k-th draw goes wrong."""

    @dataclass(frozen=True)
    class Failing(base):
        left: ClassVar[int] = 0
        how: ClassVar[type[BaseException]] = Stop

        def draw(self, site: ap.Site, generator: torch.Generator) -> Any:
            Failing.left -= 1
            if Failing.left < 0:
                raise Failing.how("out of memory")
            return super().draw(site, generator)

    return Failing


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), ap.LocalLinear(8, 8), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("how", [MemoryError, RuntimeError, Stop])
@pytest.mark.parametrize(
    ("rule", "make", "output"),
    [
        (ap.FeedbackAlignment(), TinyModel, "head"),
        (ap.KolenPollack(), encoder, "2"),
        (ap.DirectFeedback(feedback="independent"), TinyModel, "head"),
        (ap.DirectFeedback(granularity="sublayer"), encoder, "2"),
        (ap.BlockDirectFeedback(), TinyModel, "head"),
        (ap.GrAPE(calibrate_every=2), TinyModel, "head"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_draw_that_fails_at_any_place_leaves_no_trace(
    rule: Any, make: Callable[[], nn.Module], output: str, how: type[BaseException]
) -> None:
    kind = failing(type(rule))
    broken = kind(**{f.name: getattr(rule, f.name) for f in fields(rule)})
    kind.how, draws = how, 0
    model = make()
    while True:
        kind.left = draws
        try:
            ap.convert(make(), broken, output=output)
            break
        except how:
            kind.left = draws
            refused(model, broken, how, output=output)
            draws += 1
    assert draws >= 1
    kind.left = draws
    ap.convert(model, broken, output=output)  # and then it converts as if nothing had been
    kind.left = draws
    fresh = ap.convert(make(), broken, output=output)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert model.state_dict().keys() == fresh.state_dict().keys()


def test_a_class_that_may_not_be_derived_from_leaves_no_trace() -> None:
    class Picky(nn.Sequential):
        def __init_subclass__(cls) -> None:
            raise TypeError("not for you")

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), Picky(nn.Linear(4, 4)), nn.Linear(4, 2))
    refused(model, ap.DirectFeedback(granularity="block"), TypeError, output="2")


@pytest.mark.parametrize("seed", ["0", None, 1.5, torch.tensor([0.5, 1.5])], ids=str)
def test_a_seed_that_is_no_whole_number_is_refused_in_one_line(seed: Any) -> None:
    line = refused(TinyModel(), FA, ap.ConfigError, seed=seed)
    assert line.startswith("the seed must be a whole number such as 0, not ")


def test_whole_numbers_of_every_kind_are_the_same_seed() -> None:
    numpy = pytest.importorskip("numpy")
    drawn = [
        ap.convert(nn.Linear(3, 2), FA, seed=seed).B
        for seed in (3, numpy.int64(3), torch.tensor(3))
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("rule", [FA, ap.KolenPollack()], ids=str)
def test_an_attribute_that_has_the_feedbacks_name_is_in_the_way(rule: ap.AbstractRule) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].B = "mine"
    assert refused(model, rule) == (
        "this Linear has an attribute named 'B' already, which is the feedback's name: rename it"
    )


@pytest.mark.parametrize("rule", [FA, ap.SignSymmetry(), ap.KolenPollack()], ids=str)
def test_a_local_linear_takes_any_transport_rule_and_is_itself_again_after(
    rule: ap.AbstractRule,
) -> None:
    model = nn.Sequential(ap.LocalLinear(3, 3), ap.LocalLinear(3, 2, bias=True))
    types = [type(m) for m in model.modules()]
    buffers = [sorted(m._buffers.items()) for m in model.modules()]
    ap.convert(model, rule)
    model(torch.randn(4, 3)).sum().backward()
    ap.revert(model)
    assert [type(m) for m in model.modules()] == types
    assert [sorted(m._buffers.items()) for m in model.modules()] == buffers
