"""explain against what is measured: which weights' transposes a backward pass really multiplies by.

The oracle perturbs a weight in the backward pass alone, by autograd's own hooks on what it saves:
where any other gradient moves, that weight's transpose was carried.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import altprop as ap
from altprop.testing.rules import TinyModel

FA, SS = ap.FeedbackAlignment(std=0.5), ap.SignSymmetry()


class Zoo(nn.Module):
    """One of everything that multiplies by a matrix, and of what only looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.back = nn.ConvTranspose1d(6, 8, 1)
        self.norm = nn.LayerNorm((5, 8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.narrow = nn.Linear(8, 6)
        self.cross = nn.MultiheadAttention(8, 2, kdim=8, vdim=6, batch_first=True)
        self.pair = nn.Bilinear(8, 8, 8)
        self.own = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv((x + self.position).mT)
        x = self.norm(self.back(torch.tanh(x)).mT)
        x = self.gru(self.lstm(x)[0])[0]
        x = x + self.attn(x, x, x)[0]
        x = self.cross(x, x, x[..., :6] + self.narrow(x))[0]
        return self.head(torch.tanh(self.pair(x, x) @ self.own))


def measured(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Return, for each matrix, whether any other gradient depends on it in the backward pass."""
    named = dict(model.named_parameters())
    feedback = {id(p) for p in ap.feedback_parameters(model)}
    x.requires_grad_(x.is_floating_point())

    def gradients(touched: nn.Parameter | None) -> dict[str, Tensor]:
        home = None if touched is None else touched.untyped_storage().data_ptr()

        def unpack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() != home:
                return t
            # the same norm and, weight by weight, the same signs: all that sign symmetry may know
            return t.sign() * t.abs().flatten().flip(0).view(t.shape)

        torch.manual_seed(0)
        model.zero_grad()
        x.grad = None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            model(x).square().sum().backward()
        found = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        return found if x.grad is None else {**found, "input": x.grad.clone()}

    plain, out = gradients(None), {}
    for name, p in named.items():
        if p.dim() > 1 and id(p) not in feedback:
            moved = gradients(p)
            others = [n for n in plain if n != name and id(named.get(n)) not in feedback]
            out[name] = any(not torch.allclose(moved[n], plain[n], atol=1e-9) for n in others)
    return out


def explained(model: nn.Module) -> dict[str, bool]:
    sizes = {name: p.dim() for name, p in model.named_parameters()}
    rows = {row.parameter: row.transports for row in ap.explain(model).rows}
    assert not any(rows[name] for name in rows if sizes[name] < 2)
    return {name: carried for name, carried in rows.items() if sizes[name] > 1}


PURE = ap.DirectFeedback(pass_through="pure")


@pytest.mark.parametrize(
    "rules",
    [
        {"head": FA},
        {"attn": FA, "narrow": SS},
        {"attn.in_proj": ap.KolenPollack(), "cross": ap.WeightMirror(), "head": ap.Backprop()},
        {"attn": ap.DirectFeedback(), "narrow": PURE},
        {"*": FA},
    ],
    ids=["head", "attention", "projections", "broadcast", "everywhere"],
)
def test_a_transpose_remains_exactly_where_it_is_measured(
    rules: dict[str, ap.AbstractRule],
) -> None:
    model = ap.convert(Zoo().double(), rules, output="head")
    want = measured(model, torch.randn(2, 5, 4, dtype=torch.float64))
    assert explained(model) == want
    assert want["conv.weight"] and want["own"] and not want["position"] and not want["norm.weight"]


@pytest.mark.parametrize(
    "rule",
    [
        ap.Backprop(),
        FA,
        ap.SignSymmetry(variant="frsf"),
        ap.AlignedFeedback(probes=4),
        ap.DirectFeedback(),
        PURE,
        ap.DirectFeedback(granularity="block"),
        ap.BlockDirectFeedback(),
        ap.GrAPE(),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_transpose_remains_where_it_is_measured_under_every_rule(
    rule: ap.AbstractRule, tied: bool
) -> None:
    model = ap.convert(TinyModel(tied=tied).double(), rule, output="head")
    assert explained(model) == measured(model, torch.randint(7, (4, 3)))


def test_a_transpose_remains_where_it_is_measured_in_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, n_positions=8, vocab_size=11, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = transformers.GPT2LMHeadModel(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.gpt(ids).logits

    model = ap.convert(Logits().double(), {"gpt.transformer.h.0": FA})
    got = explained(model)
    assert got == measured(model, torch.randint(11, (2, 6)))
    assert got["gpt.transformer.h.1.attn.c_attn.weight"]
    assert not got["gpt.transformer.h.0.attn.c_attn.weight"]
    assert not got["gpt.transformer.wpe.weight"]


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrised_weight_counts_once_and_has_its_modules_rule(make: object) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    ap.convert(model, {"1": FA})
    for linear in model:
        make(linear)  # type: ignore[operator]
    rows = ap.explain(model).rows
    assert [row.transports for row in rows if row.parameter.startswith("0.p")].count(True) == 1
    assert {row.rule for row in rows if row.parameter.startswith("1.")} == {"FeedbackAlignment"}
    assert {row.rule for row in rows if not row.parameter.startswith("1.")} == {"Backprop"}
    assert not any(row.transports for row in rows if row.parameter.startswith("1."))
    assert {row.signal for row in rows if row.parameter[0] in "12"} == {"exact"}
    assert {row.signal for row in rows if row.parameter[0] == "0"} == {"random feedback"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_weight_made_by_a_hook_counts_once_and_has_its_modules_rule() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    ap.convert(model, {"1": FA})
    for linear in model:
        nn.utils.weight_norm(linear)
    rows = {row.parameter: (row.rule, row.transports) for row in ap.explain(model).rows}
    assert rows["0.weight_v"] == ("Backprop", True) and rows["0.weight_g"] == ("Backprop", False)
    assert rows["1.weight_v"] == rows["1.weight_g"] == ("FeedbackAlignment", False)


def test_a_parameter_receives_what_the_places_after_it_send() -> None:
    model = TinyModel(tied=False)
    ap.convert(model, {"blocks.0": SS, "blocks.1.second": FA})
    signals = {row.parameter: row.signal for row in ap.explain(model).rows}
    assert signals["norm.weight"] == signals["blocks.1.second.down.weight"] == "exact"
    assert signals["blocks.1.first.up.weight"] == "random feedback"
    assert signals["embed.weight"] == "feedback by the weights' signs and random feedback"


def test_of_a_norm_that_a_block_registers_last_no_order_is_claimed() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, norm_first=True)  # norm1 runs before every map
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    ap.convert(model.append(nn.LayerNorm(4)), {"0": FA})
    signals = {row.parameter: row.signal for row in ap.explain(model).rows}
    both = "exact or random feedback (order unknown)"
    assert signals["0.layers.1.norm1.weight"] == signals["0.layers.1.norm2.weight"] == both
    assert signals["0.layers.0.norm1.weight"] == "random feedback"
    assert signals["0.layers.1.linear2.weight"] == signals["1.weight"] == "exact"


def test_a_pass_cut_at_a_blocks_output_hears_nothing_from_above_it() -> None:
    model = TinyModel(tied=False)
    rules = {"blocks.0": ap.DirectFeedback(granularity="block"), "blocks.1": FA}
    ap.convert(model, rules, output="head")
    signals = {row.parameter: row.signal for row in ap.explain(model).rows}
    assert signals["embed.weight"] == "local backprop inside a block"
    assert signals["blocks.0.first.up.weight"] == "local backprop inside a block"
    assert signals["blocks.1.first.norm.weight"] == "random feedback"


def test_a_weight_that_is_carried_in_one_of_its_places_is_carried() -> None:
    model = TinyModel()
    for names in (("head", "embed"), ("embed", "head")):
        model._modules = {**{n: model._modules[n] for n in names}, **model._modules}
        rows = ap.explain(ap.convert(model, {"blocks": FA})).rows
        assert [row.transports for row in rows if row.parameter == f"{names[0]}.weight"] == [True]
        ap.revert(model)


def stacked() -> nn.Sequential:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    return nn.Sequential(nn.Linear(5, 4), blocks, nn.Linear(4, 2))


def test_parts_below_within_and_above_a_stack_are_told_apart() -> None:
    model = ap.convert(stacked(), {"1": ap.EP()})
    rows = {row.parameter: row for row in ap.explain(model).rows}
    assert rows["0.weight"].signal == "adjoint state of a stack"
    assert rows["1.1.0.weight"].signal == (
        "adjoint state of level 2 of 3 of the layered equilibrium"
    )
    assert rows["2.weight"].signal == "exact"
    rules = [rows[name].rule for name in ("0.weight", "1.1.0.weight", "2.weight")]
    assert rules == ["Backprop", "EP", "Backprop"]
    assert rows["1.1.0.weight"].transports and not rows["1.1.0.bias"].transports
    part = ap.explain(model[1]).rows[0]
    assert (part.parameter, part.rule) == ("0.0.weight", "EP")
    assert "level 1 of 3" in part.signal


def test_a_rule_above_a_stack_shows_below_it() -> None:
    model = ap.convert(stacked(), {"1": ap.AEP(), "2": FA})
    signals = {row.parameter: row.signal for row in ap.explain(model).rows}
    assert signals["0.weight"] == "adjoint state of a stack and random feedback"
    assert signals["1.0.0.weight"].endswith("of the layered equilibrium and random feedback")
    assert signals["2.weight"] == "exact"


def test_an_equilibrium_shows_its_estimator_with_and_without_other_rules() -> None:
    block = ap.Equilibrium(ap.DampedAttention(4, heads=2), estimator=ap.OneStep())
    model = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 2))
    for rules in ({}, {"0": FA}):
        if rules:
            ap.convert(model, rules)
        rows = {row.parameter: row for row in ap.explain(model).rows}
        inner = rows["1.dynamics.attention.W_V"]
        assert (inner.rule, inner.signal) == ("OneStep", "adjoint state of an equilibrium")
        assert rows["0.weight"].signal == "adjoint state of an equilibrium"
        assert rows["2.weight"].signal == "exact"


def test_a_part_is_explained_as_it_stands_in_the_whole() -> None:
    model = ap.convert(TinyModel(tied=False), ap.KolenPollack())
    whole = {row.parameter: row for row in ap.explain(model).rows}
    part = model.blocks[0]
    for given in (part, copy.deepcopy(part)):
        for row in ap.explain(given).rows:
            same = whole[f"blocks.0.{row.parameter}"]
            assert (row.rule, row.feedback, row.kind, row.seed, row.transports) == (
                same.rule, same.feedback, same.kind, same.seed, same.transports,
            )  # fmt: skip
    with pytest.raises(ap.RuleError, match="was not converted") as caught:
        ap.explain(model.norm)
    assert "\n" not in str(caught.value)


def test_a_drop_in_layer_shows_its_own_rule() -> None:
    model = nn.Sequential(nn.Linear(3, 4), ap.LocalLinear(4, 2, method="fa", seed=5))
    rows = {row.parameter: row for row in ap.explain(model).rows}
    own = rows["1.weight"]
    assert (own.rule, own.feedback, own.seed) == ("FeedbackAlignment", (2, 4), 5)
    assert not own.transports and rows["0.weight"].signal == "random feedback"


def test_a_lazy_weight_outside_every_pattern_is_carried_by_backprop() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))
    rows = {
        row.parameter: row
        for row in ap.explain(ap.convert(model, {"1": ap.FeedbackAlignment()})).rows
    }
    assert rows["0.weight"].transports and not rows["0.bias"].transports
    assert not rows["1.weight"].transports
