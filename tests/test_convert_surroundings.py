"""Converted models in other people's programs: defaults that are set, empty batches, loading."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.testing.rules import TinyModel
from test_rules import RULES


@contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


DEFAULTS = [
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"device": "meta"},
    {"dtype": torch.float64, "device": "meta"},
]


def model_of(rule: ap.AbstractRule | None = None) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyModel()
    return model if rule is None else ap.convert(model, rule, output="head")


TOKENS = torch.arange(12).view(3, 4) % 7


def train(model: nn.Module, passes: int = 2) -> dict[str, Tensor | None]:
    """Return the gradients of the last of some passes, of which each may draw and measure anew."""
    for _ in range(passes):
        model.zero_grad()
        nn.functional.cross_entropy(
            model(TOKENS).flatten(0, 1), TOKENS.flatten().roll(1)
        ).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# Defaults that the program has set


@pytest.mark.parametrize("options", DEFAULTS, ids=str)
@pytest.mark.parametrize("rule", [*RULES, ap.FeedbackAlignment(init="ortho_he")], ids=str)
def test_no_draw_depends_on_the_default_device_or_dtype(
    rule: ap.AbstractRule, options: dict[str, Any]
) -> None:
    plain, other = model_of(), model_of()
    ap.convert(plain, rule, output="head")
    want = train(plain)
    with defaults(**options):
        ap.convert(other, rule, output="head")
        got = train(other)
    for name, value in plain.state_dict().items():
        found = other.state_dict()[name]
        assert found.dtype == value.dtype and found.device == value.device, name
        assert torch.equal(found, value), name
    for name, gradient in want.items():
        assert gradient is not None and got[name] is not None and torch.equal(got[name], gradient)


@pytest.mark.parametrize("options", DEFAULTS, ids=str)
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "ortho_he", "sparse"])
def test_a_local_linear_draws_the_same_under_any_defaults(
    init: str, options: dict[str, Any]
) -> None:
    def layer(seed: int | None) -> ap.LocalLinear:
        return ap.LocalLinear(
            6, 5, method="fa", fa_init_mode=init, fa_grape=True, seed=seed, device="cpu",
            dtype=torch.float32,
        )  # fmt: skip

    def drawn(seed: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        one = layer(seed)
        two = ap.LocalLinear(6, 5, method="dfa", seed=seed, device="cpu", dtype=torch.float32)
        two.set_dfa_target_dim(3)
        before = one.B.detach().clone()
        one.grape_align_step()
        return [one.weight.detach(), before, one.B.detach(), two.B_dfa]

    for seed in (7, None):
        want = drawn(seed)
        with defaults(**options):
            got = drawn(seed)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Randn(ap.FeedbackAlignment):
    """A user's rule, whose draws name no device and which draws at every pass too."""

    noisy = True

    def draw(self, site: ap.Site, generator: torch.Generator) -> Tensor:
        return torch.randn(site.rows, site.columns, generator=generator)

    def noise(self, site: ap.Site, generator: torch.Generator) -> Tensor:
        return torch.randn(site.rows, site.columns, generator=generator)


def test_a_users_rule_may_draw_without_naming_the_cpu() -> None:
    x = torch.randn(2, 4)
    with defaults(device="meta"):
        layer = ap.convert(nn.Linear(4, 3, device="cpu"), Randn())
        layer(x).sum().backward()
    assert layer.B.device.type == "cpu" and layer.weight.grad.device.type == "cpu"


# The meta device


@pytest.mark.parametrize("grape", [True, False])
@pytest.mark.parametrize("seed", [3, None])
def test_a_local_linear_built_without_values_has_its_feedback_once_it_has_some(
    grape: bool, seed: int | None
) -> None:
    def layer() -> nn.Sequential:
        torch.manual_seed(1)
        own = ap.LocalLinear(6, 5, True, "fa", fa_grape=grape, seed=seed)
        return nn.Sequential(own, nn.Linear(5, 2))

    with torch.device("meta"):
        late = layer()
    assert late[0].B.is_meta and isinstance(late[0].B, nn.Parameter) == grape
    plain = layer() if seed is not None else None
    late.to_empty(device="cpu")
    with torch.no_grad():
        late[0].weight.fill_(1.0), late[0].bias.zero_()
    twin = ap.LocalLinear(6, 5, True, "fa", fa_grape=grape, seed=late[0].seed)
    assert torch.equal(late[0].B, twin.B) and isinstance(late[0].B, nn.Parameter) == grape
    assert plain is None or torch.equal(late[0].B, plain[0].B)
    x = torch.randn(3, 6, requires_grad=True)
    late[0](x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(3, 5) @ twin.B, atol=1e-6)


def test_a_state_dict_assigned_to_a_local_linear_without_values_keeps_the_seeded_draw() -> None:
    plain = ap.LocalLinear(6, 5, method="fa", seed=3)
    for state in (plain.state_dict(), nn.Linear(6, 5, bias=False).state_dict()):
        late = ap.LocalLinear(6, 5, method="fa", seed=3, device="meta")
        late.load_state_dict(state, assign=True)
        assert torch.equal(late.B, plain.B) and torch.equal(late.weight, state["weight"])


def test_targets_of_a_layer_on_the_meta_device_are_refused() -> None:
    model = nn.Sequential(ap.LocalLinear(6, 5, method="dfa", device="meta"))
    with pytest.raises(ap.RuleError, match="materialise the model first"):
        ap.initialize_dfa_targets(model, 3)
    assert model[0].B_dfa is None


# Empty batches


class Plain(nn.Module):
    sublayer_outputs = ("down",)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
                                    for _ in range(2))  # fmt: skip
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        if x.dim() == 3:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


@pytest.mark.parametrize("shape", [(0,), (0, 7), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("rule", [r for r in RULES if "sublayer" not in str(r)], ids=str)
def test_an_empty_batch_has_zero_gradients(rule: ap.AbstractRule, shape: tuple[int, ...]) -> None:
    model = ap.convert(Plain().double(), rule, output="head")
    out = model(torch.randn(*shape, 5, dtype=torch.float64))
    assert out.shape == (*shape, 3)
    out.sum().backward()
    used = len(shape) == 2
    noisy = getattr(rule, "noisy", False)
    for name, p in model.named_parameters():
        if used or not name.startswith("attention"):
            assert p.grad is not None and bool(p.grad.isfinite().all()), name
            mirrored = noisy and name.rpartition(".")[2].startswith("B")  # noise is no data
            assert mirrored or not p.grad.any(), name


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("rule", [r for r in RULES if "sublayer" not in str(r)], ids=str)
def test_a_map_of_no_features_passes_nothing_on(
    rule: ap.AbstractRule, shape: tuple[int, ...]
) -> None:
    block = nn.Sequential(nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 5))
    model = ap.convert(nn.Sequential(block, nn.Linear(5, 3)), rule, output="1")
    x = torch.randn(*shape, 4, requires_grad=True)
    model(x).sum().backward()
    assert not x.grad.any() and model[1].weight.grad.isfinite().all()
    assert block[0].weight.grad.shape == (0, 4) and block[2].weight.grad.shape == (5, 0)


@pytest.mark.parametrize("method", ["bp", "fa", "sign_sym", "dfa", "dfa_block"])
@pytest.mark.parametrize("shape", [(0,), (0, 7), (4, 0)], ids=str)
def test_a_local_linear_takes_an_empty_batch(method: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(ap.LocalLinear(6, 5, True, method))
    x = torch.randn(*shape, 6, requires_grad=True)
    model(x).sum().backward()
    if method == "dfa":
        ap.initialize_dfa_targets(model, 3)
        ap.apply_dfa_update(model, torch.randn(*shape, 3))
    elif method == "dfa_block":
        ap.initialize_dfa_block_targets(model, 3)
        ap.apply_dfa_block_update(model, torch.randn(*shape, 3))
    assert x.grad.shape == x.shape
    assert not model[0].weight.grad.any() and not model[0].bias.grad.any()


# What the class of a converted model makes


@pytest.mark.parametrize("rule", [ap.FeedbackAlignment(), ap.DirectFeedback(), ap.GrAPE()], ids=str)
def test_the_class_of_a_converted_model_makes_plain_ones(rule: ap.AbstractRule) -> None:
    model = model_of(rule)
    for kind in (type(model), type(model.head)):
        assert kind.__name__ in ("TinyModel", "Linear")
    plain = type(model)(tied=False)
    assert type(plain) is TinyModel and type(plain.head) is nn.Linear
    assert type(type(model.blocks[0].first.up)(3, 2)) is nn.Linear
    plain(TOKENS).sum().backward()
    ap.convert(plain, rule, output="head")  # as any other
    assert type(plain) is type(model) and isinstance(plain, TinyModel)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(twin) is type(model)


def test_a_class_with_a_metaclass_of_its_own_keeps_it() -> None:
    class Meta(type):
        def shout(cls) -> str:
            return cls.__name__.upper()

    class Net(nn.Sequential, metaclass=Meta):
        pass

    net = ap.convert(Net(nn.Linear(3, 4), nn.Linear(4, 2)), ap.DirectFeedback(), output="1")
    assert type(net) is not Net and type(net).shout() == "NET"
    assert type(type(net)(nn.Linear(3, 4))) is Net


@pytest.mark.filterwarnings("ignore")  # theirs, not ours
@pytest.mark.parametrize(
    "rule", [ap.FeedbackAlignment(), ap.DirectFeedback(), ap.GrAPE(), ap.KolenPollack()], ids=str
)
def test_from_pretrained_of_a_converted_class_gives_a_plain_model(
    rule: ap.AbstractRule, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    plain = transformers.GPT2LMHeadModel(config)
    model = ap.convert(copy.deepcopy(plain), rule, output="lm_head")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    made = type(model)(config)
    for other in (loaded, made):
        assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]
        assert other.state_dict().keys() == plain.state_dict().keys()
        other(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_converted_checkpoint_loads_into_a_plain_model_in_two_ways() -> None:
    saved = model_of(ap.KolenPollack())
    train(saved)
    state = saved.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"blocks.0.first.up.B"'):
        TinyModel().load_state_dict(state)
    plain = TinyModel()
    assert all("B" in key for key in plain.load_state_dict(state, strict=False).unexpected_keys)
    again = ap.convert(TinyModel(), ap.KolenPollack(), output="head", seed=5)
    again.load_state_dict(state)
    for name, value in state.items():
        assert torch.equal(again.state_dict()[name], value), name
        assert "B" in name or torch.equal(plain.state_dict()[name], value), name


# Names


class Twelve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(12))
        self.head = nn.Linear(4, 2)


def taken(model: nn.Module) -> list[int]:
    return [i for i, block in enumerate(model.blocks) if hasattr(block["proj"], "B")]


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("blocks.1", [1]),
        ("blocks.1.*", [1]),
        ("blocks.1*", [1, 10, 11]),
        ("blocks.*", list(range(12))),
        ("blocks", list(range(12))),
        ("*.proj", list(range(12))),
        ("blocks.[13]", [1, 3]),
        ("blocks.1?", [10, 11]),
        ("*1.proj", [1, 11]),
    ],
)
def test_a_pattern_names_whole_parts_of_a_path(pattern: str, want: list[int]) -> None:
    model = ap.convert(Twelve(), {pattern: ap.FeedbackAlignment()})
    assert taken(model) == want and not hasattr(model.head, "B")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_places_with_the_same_last_name_have_feedback_of_their_own(rule: ap.AbstractRule) -> None:
    model = model_of(rule)
    drawn: dict[str, Tensor] = {
        name: value
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2].startswith("B") and not name.endswith("B_step")
    }
    shapes = {name: (name.rpartition(".")[2], value.shape) for name, value in drawn.items()}
    for one in drawn:
        for other in drawn:
            if one < other and shapes[one] == shapes[other]:
                assert not torch.equal(drawn[one], drawn[other]), (one, other)
