"""convert, revert, explain: the places that are found, and what is refused before any change."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import altprop as ap
from altprop.testing.rules import TinyModel
from conversions import mlp

FA, SS = ap.FeedbackAlignment(), ap.SignSymmetry()


def test_patterns_give_each_place_its_rule_and_the_first_match_counts() -> None:
    model = TinyModel()
    ap.convert(model, {"blocks.0": FA, "blocks.*.up": SS, "head": ap.Backprop()})
    rules = {row.parameter: row.rule for row in ap.explain(model).rows}
    assert rules["blocks.0.first.up.weight"] == "FeedbackAlignment"
    assert rules["blocks.1.first.up.weight"] == "SignSymmetry"
    assert rules["blocks.1.first.down.weight"] == "Backprop"
    assert type(model.head) is nn.Linear


def test_backprop_put_first_keeps_a_block_from_a_rule_for_blocks() -> None:
    model = TinyModel()
    rule = ap.DirectFeedback("block", feedback="independent")
    ap.convert(model, {"blocks.0": ap.Backprop(), "blocks.*": rule}, output="head")
    names = {name for name, _ in model.named_buffers()}
    assert "blocks.1.B_dfa" in names and "blocks.0.B_dfa" not in names


def test_a_rule_for_maps_keeps_no_block_from_a_rule_for_blocks() -> None:
    model = TinyModel()
    rule = ap.DirectFeedback("block", feedback="independent")
    ap.convert(model, {"blocks.0": FA, "blocks.*": rule}, output="head")
    names = {name for name, _ in model.named_buffers()}
    assert {"blocks.0.B_dfa", "blocks.1.B_dfa", "blocks.0.first.up.B"} <= names


def test_a_block_does_not_take_the_maps_of_one_whose_name_begins_like_its_own() -> None:
    chain = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(11)))
    ap.convert(chain, ap.BlockDirectFeedback())
    assert all(module[0].B_dfa_block.shape == (3, 3) for module in chain)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (ap.FeedbackAlignment, {}, r"write FeedbackAlignment\(\)"),
        ({}, {}, "mapping of name patterns"),
        ({"bloks.*": FA}, {}, "'bloks\\.\\*'.* matches no linear map"),
        ({"blocks": FA, "blocks.0": SS}, {}, "taken by one before it"),
        (ap.DirectFeedback(), {}, "output='head'"),
        (ap.DirectFeedback(), {"output": "haed"}, "did you mean head"),
        (ap.DirectFeedback(), {"output": "norm"}, "not the path of a linear map"),
        ({"head": ap.DirectFeedback(granularity="block")}, {"output": "head"}, "holds the output"),
        (
            {"blocks.*.up": FA, "blocks.*": ap.BlockDirectFeedback()},
            {},
            "FeedbackAlignment and BlockDirectFeedback both claim",
        ),
    ],
)
def test_bad_input_gives_one_error_and_leaves_the_model_untouched(
    rule: object, options: dict[str, str], message: str
) -> None:
    model = TinyModel()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    with pytest.raises(ap.AltpropError, match=message):
        ap.convert(model, rule, **options)  # type: ignore[arg-type]
    assert [type(m) for m in model.modules()] == types
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert before.keys() == model.state_dict().keys()


def test_one_error_lists_every_problem_with_its_path() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Odd(2, 2), "b": nn.Linear(2, 2), "c": Odd(2, 2)})
    with pytest.raises(ap.RuleError) as caught:
        ap.convert(model, FA)
    assert "a: Odd is a subclass" in str(caught.value) and "c: Odd" in str(caught.value)
    assert type(model["b"]) is nn.Linear
    ap.convert(model, {"a": ap.Backprop(), "c": ap.Backprop(), "*": FA})
    with pytest.raises(ap.RuleError, match=r"already converted.*revert\(model\)"):
        ap.convert(model, FA)
    nn.utils.parametrizations.weight_norm(ap.revert(model)["b"])
    with pytest.raises(ap.RuleError, match="ParametrizedLinear"):
        ap.convert(model, {"b": FA})


def test_a_rule_within_an_equilibrium_is_refused() -> None:
    class Opaque(nn.Sequential):
        opaque_to_rules = True

    with pytest.raises(ap.RuleError, match="adjoint"):
        ap.convert(nn.Sequential(Opaque(nn.Linear(2, 2))), FA)


def test_revert_needs_a_converted_model() -> None:
    with pytest.raises(ap.RuleError, match="was not converted"):
        ap.revert(nn.Linear(2, 2))
    with pytest.raises(ap.RuleError, match="was not converted"):
        ap.explain(nn.Linear(2, 2))


def test_local_linear_converts_only_from_plain_backprop() -> None:
    model = nn.Sequential(ap.LocalLinear(3, 3), ap.LocalLinear(3, 2, method="fa"))
    with pytest.raises(ap.RuleError, match="build it with method='bp'"):
        ap.convert(model, SS)
    ap.convert(model[:1], SS)


def test_frozen_parameters_and_feedback_show_in_explain() -> None:
    model = TinyModel(tied=False)
    model.embed.requires_grad_(False)
    ap.convert(model, ap.KolenPollack(), seed=7)
    table = ap.explain(model)
    rows = {row.parameter: row for row in table.rows}
    assert rows["embed.weight"].signal == "none (frozen)"
    row = rows["blocks.0.first.up.weight"]
    assert (row.signal, row.feedback, row.kind, row.seed) == (
        "learned feedback",
        (16, 8),
        "learned",
        7,
    )
    assert rows["head.weight"].signal == "exact"
    assert "add_feedback(optimizer, model)" in str(table)
    assert not any(row.transports for row in table.rows)


def test_explain_tells_tied_weights_and_remaining_transports() -> None:
    model = ap.convert(TinyModel(), ap.DirectFeedback(granularity="block"), output="head")
    rows = {row.parameter: row for row in ap.explain(model).rows}
    assert rows["embed.weight"].signal == "local backprop inside a block + exact (tied)"
    assert rows["blocks.1.second.up.weight"].signal == "local backprop inside a block"
    assert rows["blocks.1.second.up.weight"].transports
    assert rows["norm.weight"].signal == "exact"


def encoder(norm_first: bool = False, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    return nn.Sequential(stack, nn.Linear(8, 3, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_layers_compute_the_same_and_obey_their_rules(
    norm_first: bool, training: bool
) -> None:
    model = encoder(norm_first).train(training)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)

    def outputs() -> list[Tensor]:
        stack = model[0]
        with torch.no_grad():
            masked = stack(x, src_key_padding_mask=padding)[~padding]
            return [stack(x), masked, stack(x, mask=causal, is_causal=True)]

    before, recorded = outputs(), model(x)
    plain = torch.autograd.grad(recorded.square().sum(), list(model.parameters()))
    ap.convert(model, FA)
    for got, want in zip(outputs(), before, strict=True):
        assert torch.allclose(got, want, atol=1e-12)
    assert torch.equal(model(x), recorded)
    model(x).square().sum().backward()
    changed = [
        name
        for (name, p), exact in zip(model.named_parameters(), plain, strict=True)
        if not torch.allclose(p.grad, exact)
    ]
    assert any("in_proj" in name for name in changed), "attention ignored its rule"
    # feedback := weight is backprop, the packed projection included
    model.zero_grad()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.B_in_proj.copy_(module.in_proj_weight)
            elif isinstance(module, nn.Linear):
                module.B.copy_(module.weight)
    model(x).square().sum().backward()
    for parameter, want in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(parameter.grad, want, atol=1e-10)
    ap.revert(model)
    assert model[0].use_nested_tensor is not norm_first


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kdim", [None, 6])
def test_cross_attention_equals_torch_and_splits_its_feedback(
    need_weights: bool, kdim: int | None
) -> None:
    torch.manual_seed(0)
    m = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, dtype=torch.float64)
    q = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(5, 3, kdim or 8, dtype=torch.float64, requires_grad=True)
    other = copy.deepcopy(m)
    ap.convert(m, FA)
    with torch.no_grad():
        for name, B in m.named_buffers():
            B.copy_(m.get_parameter(name.replace("B_", "") + "_weight") if "B_" in name else
                    m.out_proj.weight)  # fmt: skip
    results = []
    for module in (m, other):
        out, weights = module(q, kv, kv, need_weights=need_weights)
        gq, gkv = torch.autograd.grad(out.square().sum(), (q, kv))
        results.append((out, gq, gkv, weights))
    for got, want in zip(*results, strict=True):
        if want is None:
            assert got is None
        else:
            assert torch.allclose(got, want, atol=1e-10)
    assert torch.allclose(m(q[:, 0], kv[:, 0], kv[:, 0])[0], other(q[:, 0], kv[:, 0], kv[:, 0])[0])


@pytest.mark.parametrize("rule", [FA, SS, ap.SignSymmetry(variant="frsf"), ap.KolenPollack()])
def test_a_joint_projection_is_one_map_whatever_it_is_given(rule: ap.AbstractTransport) -> None:
    m = ap.convert(nn.MultiheadAttention(8, 2, dtype=torch.float64), rule)
    with torch.no_grad():
        m.in_proj_weight[:8] *= 3.0  # the queries' part has another norm than the others
    x = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for copies in ((x, x, x), (x, x.clone(), x.clone())):
        m.zero_grad()
        x.grad = None
        m(*copies)[0].square().sum().backward()
        found.append([x.grad, *(p.grad for p in m.parameters())])
    for self_, cross in zip(*found, strict=True):
        assert torch.allclose(self_, cross, atol=1e-12)


def test_attention_with_options_that_are_not_covered_is_refused() -> None:
    with pytest.raises(ap.RuleError, match="add_bias_kv=True"):
        ap.convert(nn.MultiheadAttention(4, 2, add_bias_kv=True), FA)


def test_sublayer_taps_exist_where_the_summed_residual_is_an_output() -> None:
    rule = ap.DirectFeedback(granularity="sublayer")
    model = ap.convert(encoder(), rule, output="1")
    model(torch.randn(2, 4, 8, dtype=torch.float64)).square().sum().backward()
    assert model[0].layers[0].norm1.weight.grad.abs().max() > 0
    with pytest.raises(ap.RuleError, match="granularity='block'"):
        ap.convert(encoder(norm_first=True), rule, output="1")


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model = ap.convert(TinyModel(), ap.DirectFeedback(granularity="block"), output="head")
    tokens = torch.zeros(2, 3, dtype=torch.long)
    hook = model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens)
    hook.remove()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()


class Again(nn.Module):
    """A model that may run itself once more in its own forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high, self.head = (nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        x = torch.tanh(self.low(x))
        x = self(x) if again else x
        return self.head(torch.tanh(self.high(x)))


def test_a_pass_within_a_pass_has_an_error_and_taps_of_its_own() -> None:
    model = ap.convert(Again(), ap.DirectFeedback(feedback="independent", std=0.5), output="head")
    x, logits = torch.randn(5, 4).double(), []
    model.head.register_forward_hook(lambda m, given, out: logits.append(out))
    model(x, again=True).cos().sum().backward(inputs=[*logits, model.low.weight])
    inner, outer = (z.grad for z in logits)
    with torch.no_grad():
        low = torch.tanh(model.low(x))
        want = (outer @ model.low.B_dfa.T).T @ x + (inner @ model.low.B_dfa.T).T @ low
    assert torch.allclose(model.low.weight.grad, want)


@pytest.mark.parametrize("feedback", ["shared", "independent"])
def test_a_map_that_runs_after_the_output_is_refused_for_no_error_reaches_it(feedback: str) -> None:
    model = ap.convert(mlp(), ap.DirectFeedback(feedback=feedback), output="0")
    with pytest.raises(ap.RuleError, match="1 tapped outputs were computed after the output"):
        model(torch.randn(3, 6).double())


def test_a_block_of_another_width_names_the_option_to_give() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 6), nn.GLU())
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    rules = {"body": ap.DirectFeedback(granularity="block")}
    net = ap.convert(Net(), rules, output="head")
    with pytest.raises(ap.RuleError, match="features=3"):
        net(torch.randn(5, 4))
    ap.revert(net)
    ap.convert(net, {"body": ap.DirectFeedback(granularity="block", features=3)}, output="head")
    net(torch.randn(5, 4)).sum().backward()
