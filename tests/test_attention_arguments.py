"""A converted attention accepts, refuses and returns what torch's does, for every argument.

The oracle is the module before it was converted: the same output and weights, or an error of the
same type. Where gradients are recorded, feedback equals the weight, so that they must agree too.
Shapes: (L, N, E) target, (S, N, E) source, `H` heads.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap

N, L, S, E, H = 2, 3, 4, 8, 2
DOUBLE = torch.float64
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors"
)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return a module as it is, and converted with each feedback equal to its weight."""
    torch.manual_seed(0)
    plain = make()
    converted = ap.convert(copy.deepcopy(plain), ap.FeedbackAlignment())
    with torch.no_grad():
        for module in converted.modules():
            if isinstance(module, nn.MultiheadAttention):
                for name, B in module.named_buffers(recurse=False):
                    B.copy_(module.get_parameter(name.replace("B_", "") + "_weight"))
            elif isinstance(module, nn.Linear):
                module.B.copy_(module.weight)
    return plain, converted


def outcome(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what a call gives, with the gradients of its parameters; or its error's type."""
    module.zero_grad()
    torch.manual_seed(1)
    try:
        found = module(*args, **kwargs)
    except Exception as error:
        return type(error)
    parts = [found] if isinstance(found, Tensor) else list(found)
    parts = [p if p is None or not p.is_nested else p.to_padded_tensor(0.0) for p in parts]
    if parts[0].requires_grad:
        parts[0].cos().sum().backward()
        parts += [p.grad for p in module.parameters()]
    return parts


def check_same(pair: tuple[nn.Module, nn.Module], what: Any, *args: Any, **kwargs: Any) -> bool:
    """Compare both outcomes; say whether torch accepts the call."""
    want, got = (outcome(module, *args, **kwargs) for module in pair)
    if isinstance(want, type) or isinstance(got, type):
        assert got is want, f"{what}: {got} where torch has {want}"
        return False
    assert len(got) == len(want), what
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None), what
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype, what
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True), what
    return True


def modes(both: tuple[nn.Module, nn.Module], frozen: tuple[bool, ...] = (False,)) -> Iterator[str]:
    """Go through training and evaluation, recording and not; with all parameters frozen too."""
    for training, recording, still in itertools.product((True, False), (True, False), frozen):
        for module in both:
            module.train(training).requires_grad_(not still)
        words = ["training" if training else "evaluation"]
        words += ["recording"] * recording + ["frozen"] * still
        with torch.set_grad_enabled(recording):
            yield ", ".join(words)


def attn_masks(L: int, S: int) -> dict[str, Tensor | None]:
    hidden = torch.triu(torch.ones(L, S, dtype=torch.bool), 1)
    several = torch.stack([hidden, hidden.roll(1, 1)] * N)
    added = torch.zeros(L, S, dtype=DOUBLE).masked_fill_(hidden, -math.inf)
    blind = hidden.clone()
    blind[1] = True
    return {
        "none": None,
        "bool": hidden,
        "float": added,
        "finite": draw(L, S),
        "float32": added.float(),
        "half": added.half(),
        "integer": hidden.long(),
        "uint8": hidden.to(torch.uint8),
        "complex": added.to(torch.complex128),
        "3-D bool": several,
        "3-D float": draw(N * H, L, S),
        "3-D integer": several.long(),
        "one row blind": blind,
        "one row blind, float": torch.zeros(L, S, dtype=DOUBLE).masked_fill_(blind, -math.inf),
        "all blind": torch.ones(L, S, dtype=torch.bool),
        "of one head": hidden[None],
        "of wrong length": torch.zeros(L, S + 1, dtype=torch.bool),
        "transposed": torch.zeros(S, L, dtype=torch.bool),
        "of one batch": several[:N],
        "1-D": hidden[0],
        "4-D": several.view(N, H, L, S),
        "broadcast": hidden[:1],
    }


def paddings(S: int) -> dict[str, Tensor | None]:
    late = torch.zeros(N, S, dtype=torch.bool)
    late[0, S - 1 :] = True
    gone = late.clone()
    gone[1] = True
    return {
        "none": None,
        "bool": late,
        "float": torch.zeros(N, S, dtype=DOUBLE).masked_fill_(late, -math.inf),
        "float32": torch.zeros(N, S),
        "integer": late.long(),
        "uint8": late.to(torch.uint8),
        "one sample gone": gone,
        "of wrong length": torch.zeros(N, S + 1, dtype=torch.bool),
        "of another batch": torch.zeros(N + 1, S, dtype=torch.bool),
        "1-D": late[0],
        "3-D": late[None],
    }


SOME = ("none", "bool", "float", "integer", "one row blind")
WAYS: list[dict[str, Any]] = [
    {"need_weights": False},
    {"average_attn_weights": False},
    {"need_weights": False, "is_causal": True},
    {},
    {"is_causal": True},
]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "kdim"])
def test_every_mask_does_what_it_does_in_torch(kind: str, batch_first: bool) -> None:
    options: dict[str, Any] = {"kdim": 6, "vdim": 6} if kind == "kdim" else {}
    options |= {"bias": kind != "kdim", "batch_first": batch_first, "dtype": DOUBLE}
    both = pair(lambda: nn.MultiheadAttention(E, H, **options))
    length = L if kind == "self" else S
    x, other = draw(N, L, E), draw(N, length, 6 if kind == "kdim" else E)
    if not batch_first:
        x, other = x.transpose(0, 1), other.transpose(0, 1)
    inputs = (x, x, x) if kind == "self" else (x, other, other)
    masks, gaps = attn_masks(L, length), paddings(length)
    few = [*itertools.product(masks, ["none"]), *itertools.product(["none"], gaps)]
    count = [0, 0]
    for mode in modes(both, frozen=(False, True) if kind == "self" else (False,)):
        every = kind == "self" and mode == "training, recording"
        chosen = itertools.product(masks, gaps) if every else few
        for (mask, gap), way in itertools.product(chosen, [WAYS[batch_first]] if every else WAYS):
            if way in WAYS[3:] and (mask, gap) not in few[:3]:
                continue  # the average of what WAYS[1] gives
            if "frozen" in mode and mask not in SOME:
                continue
            what = (kind, mode, f"attn_mask={mask}", f"key_padding_mask={gap}", way)
            arguments = {"attn_mask": masks[mask], "key_padding_mask": gaps[gap], **way}
            count[check_same(both, what, *inputs, **arguments)] += 1
    assert min(count) > 100, "the table lacks calls that torch refuses, or accepts"


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_inputs_and_their_masks_do_what_they_do_in_torch(batch_first: bool) -> None:
    both = pair(lambda: nn.MultiheadAttention(E, H, batch_first=batch_first, dtype=DOUBLE))
    x, other = draw(L, E), draw(S, E)
    masks = attn_masks(L, S) | {"3-D, a sample": attn_masks(L, S)["3-D bool"][:H]}
    gap = torch.tensor([False] * (S - 1) + [True])
    gaps = {"none": None, "bool": gap, "integer": gap.long(), "2-D": gap[None], "short": gap[1:]}
    count = [0, 0]
    for mode in modes(both):
        for (mask, gap_name), way in itertools.product(
            [*itertools.product(masks, ["none"]), *itertools.product(["none"], gaps)], WAYS[:3]
        ):
            what = (mode, f"attn_mask={mask}", f"key_padding_mask={gap_name}", way)
            arguments = {"attn_mask": masks[mask], "key_padding_mask": gaps[gap_name], **way}
            count[check_same(both, what, x, other, other, **arguments)] += 1
    assert min(count) > 100


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kdim", [None, 6])
def test_inputs_of_wrong_shapes_and_kinds_are_refused_as_in_torch(
    batch_first: bool, kdim: int | None
) -> None:
    options = {"kdim": kdim, "vdim": kdim, "batch_first": batch_first, "dtype": DOUBLE}
    both = pair(lambda: nn.MultiheadAttention(E, H, **options))
    x, k, F = draw(3, 3, E), draw(3, 3, kdim or E), kdim or E
    table = {
        "right": (x, k, k),
        "separate": (x, k.clone(), k.clone()),
        "query is key": (x, x, k),
        "narrow query": (x[..., 1:], k, k),
        "narrow key": (x, k[..., 1:], k),
        "narrow value": (x, k, k[..., 1:]),
        "narrow memory": (x, k[..., 1:], k[..., 1:]),
        "longer value": (x, k, draw(4, 3, F)),
        "wider value": (x, k, draw(3, 4, F)),
        "another batch": (x, draw(4, 4, F), draw(4, 4, F)),
        "one sample of memory": (x, k[:1], k[:1]),
        "one token of memory": (x, k[:, :1], k[:, :1]),
        "4-D": (x[None], k[None], k[None]),
        "1-D": (x[0, 0], k[0, 0], k[0, 0]),
        "unbatched query": (x[0], k, k),
        "unbatched key": (x, k[0], k),
        "float32": (x.float(), k.float(), k.float()),
        "float32 key": (x, k.float(), k),
        "integer": (x.long(), k.long(), k.long()),
        "empty batch": (x[:0], k[:0], k[:0]),
        "no token": (x[:, :0], k[:, :0], k[:, :0]),
        "no array": ([1.0], k, k),
        "none": (None, None, None),
    }
    for mode in modes(both):
        accepted = [
            name
            for (name, inputs), way in itertools.product(table.items(), WAYS[:3])
            if check_same(both, (mode, name, way), *inputs, **way)
        ]
        assert {"right", "separate"} <= set(accepted)
        assert not {"narrow key", "longer value", "4-D", "none"} & set(accepted)
    for mask in ([[0]], 1, "causal"):
        assert not check_same(both, mask, x, k, k, attn_mask=mask)
        assert not check_same(both, mask, x, k, k, key_padding_mask=mask)


def test_dropout_takes_the_same_random_numbers() -> None:
    for batch_first, way in itertools.product((False, True), WAYS[:2]):
        options = {"dropout": 0.4, "batch_first": batch_first, "dtype": DOUBLE}
        both = pair(lambda o=options: nn.MultiheadAttention(E, H, **o))
        x = draw(N, L, E)
        assert check_same(both, way, x, x, x, **way)
        assert not torch.equal(both[1](x, x, x)[0], both[1](x, x, x)[0])


def test_outputs_are_equal_to_the_bit_in_float32() -> None:
    for batch_first, bias, way in itertools.product((False, True), (False, True), WAYS[:2]):
        options = {"batch_first": batch_first, "bias": bias}
        plain, converted = pair(lambda o=options: nn.MultiheadAttention(24, 3, **o))
        x, memory = torch.randn(5, 7, 24), torch.randn(5, 7, 24)
        for source in (x, memory):
            got, want = converted(x, source, source, **way), plain(x, source, source, **way)
            assert torch.equal(got[0], want[0])
            assert got[1] is want[1] is None or torch.equal(got[1], want[1])


def nested() -> Tensor:
    return torch.nested.nested_tensor([draw(3, E), draw(2, E)])


def test_nested_tensors_go_where_torch_takes_them() -> None:
    for batch_first in (True, False):
        both = pair(lambda b=batch_first: nn.MultiheadAttention(E, H, batch_first=b, dtype=DOUBLE))
        accepted = set()
        for mode in modes(both, frozen=(False, True)):
            for mask in (None, torch.zeros(3, 3, dtype=torch.bool)):
                for way in WAYS[:2]:
                    x = nested()
                    if check_same(both, (mode, way), x, x, x, attn_mask=mask, **way):
                        accepted.add(mode)
        assert ("evaluation" in accepted) is batch_first
        assert "training, recording" not in accepted


def encoder(layers: int, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, 16, 0.0, dtype=DOUBLE, **options)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(E).double()) if layers else layer


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(
    ("layers", "batch_first", "norm_first"),
    [(0, True, False), (0, False, True), (1, True, False), (1, False, False), (1, True, True)],
)
def test_encoders_take_and_refuse_what_torch_does(
    layers: int, batch_first: bool, norm_first: bool
) -> None:
    both = pair(lambda: encoder(layers, batch_first=batch_first, norm_first=norm_first))
    x = draw(N, L, E) if batch_first else draw(L, N, E)
    name = "mask" if layers else "src_mask"
    masks, gaps = attn_masks(L, L), paddings(L)
    few = [*itertools.product(masks, ["none"]), *itertools.product(["none"], gaps)]
    few += [("bool", "bool"), ("float", "bool"), ("bool", "float"), ("bool", "integer")]
    count = [0, 0]
    for mode in modes(both, frozen=(False, True)):
        for (mask, gap), causal in itertools.product(few, (False, True)):
            if (causal or "frozen" in mode) and mask not in SOME:
                continue
            arguments = {name: masks[mask], "src_key_padding_mask": gaps[gap]}
            what = (mode, mask, gap, causal)
            count[check_same(both, what, x, is_causal=causal, **arguments)] += 1
        check_same(both, (mode, "unbatched"), x[0], **{name: masks["bool"]})
        check_same(both, (mode, "nested"), nested())
    assert min(count) > 100


@pytest.mark.parametrize(("batch_first", "norm_first"), [(False, True), (True, False)])
def test_decoders_take_and_refuse_what_torch_does(batch_first: bool, norm_first: bool) -> None:
    options = {"batch_first": batch_first, "norm_first": norm_first, "dtype": DOUBLE}
    layer = nn.TransformerDecoderLayer(E, H, 16, 0.0, **options)
    both = pair(lambda: nn.TransformerDecoder(layer, 2))
    x, memory = (draw(N, n, E) if batch_first else draw(n, N, E) for n in (L, S))
    count = [0, 0]
    for mode in modes(both):
        for arguments in (
            *({"tgt_mask": mask} for mask in attn_masks(L, L).values()),
            *({"memory_mask": mask} for mask in attn_masks(L, S).values()),
            *({"tgt_key_padding_mask": gap} for gap in paddings(L).values()),
            *({"memory_key_padding_mask": gap} for gap in paddings(S).values()),
            {"tgt_mask": attn_masks(L, L)["float"], "tgt_is_causal": True},
            {"tgt_is_causal": True},
        ):
            what = (mode, {k: getattr(v, "dtype", v) for k, v in arguments.items()})
            count[check_same(both, what, x, memory, **arguments)] += 1
    assert min(count) > 30


def test_a_fast_path_inside_a_recorded_pass_is_refused_and_not_silent() -> None:
    """Reentrant checkpointing runs it unrecorded, and what it recomputes could hear no error."""
    inside = encoder(2, batch_first=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = inside.eval(), nn.Linear(E, 3, dtype=DOUBLE)

        def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
            run = torch.utils.checkpoint.checkpoint
            return self.head(run(self.encoder, x, None, padding, use_reentrant=True))

    model = ap.convert(Model(), ap.DirectFeedback(), output="head")
    x = draw(N, L, E).requires_grad_()
    for padding in (None, paddings(L)["bool"]):
        with pytest.raises(ap.RuleError, match="use_reentrant=False"):
            model(x, padding)


@pytest.mark.filterwarnings("ignore")
def test_compiled_attention_equals_eager_training_and_evaluating() -> None:
    _, model = pair(lambda: encoder(0, batch_first=True))
    x, mask = draw(N, L, E), attn_masks(L, L)["bool"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training, recording in ((True, True), (False, True), (False, False)):
        model.train(training)
        with torch.set_grad_enabled(recording):
            assert torch.allclose(compiled(x, mask), model(x, mask), rtol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_options_that_add_keys_are_refused_and_nothing_is_changed(option: str) -> None:
    attention = nn.MultiheadAttention(E, H, **{option: True})
    before = {**attention.__dict__}, type(attention)
    with pytest.raises(ap.RuleError, match=f"{option}=True is not supported"):
        ap.convert(attention, ap.FeedbackAlignment())
    assert ({**attention.__dict__}, type(attention)) == before


def test_a_projection_left_to_backprop_computes_as_before() -> None:
    x, other = draw(N, L, E), draw(N, S, 6)
    for options in ({}, {"kdim": 6, "vdim": 6}):
        torch.manual_seed(0)
        plain = nn.MultiheadAttention(E, H, dtype=DOUBLE, batch_first=True, **options)
        converted = ap.convert(copy.deepcopy(plain), {"out_proj": ap.FeedbackAlignment()})
        inputs = (x, other, other) if options else (x, x, x)
        assert torch.equal(plain(*inputs)[0], converted(*inputs)[0])


def test_dropout_acts_in_training_alone() -> None:
    both, x = pair(lambda: nn.MultiheadAttention(E, H, dropout=0.5, dtype=DOUBLE)), draw(L, N, E)
    for what in modes(both):
        assert check_same(both, what, x, x, x)
