"""After another library's surgery, revert, explain and rules_off speak of modules as they *are*.

Parametrised, pruned, replaced, resized, quantised and merged weights. The oracle is the same
surgery on a model that was never converted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

import altprop as ap
from altprop.conversion.roles import Role
from conversions import TOKENS, assert_equal, assert_same_model, gradients, mlp, tiny
from refusals import one_line

FA = ap.FeedbackAlignment(std=0.5)


# --- parametrisations

NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def attention() -> nn.MultiheadAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.MultiheadAttention(8, 2).double()


MADE: dict[str, tuple[Callable[[], nn.Module], str, str, tuple[int, ...]]] = {
    "linear": (mlp, "0", "weight", (3, 6)),
    "attention": (attention, "", "in_proj_weight", (3, 1, 8)),
    "inner projection": (attention, "out_proj", "weight", (3, 1, 8)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", MADE)
def test_a_parametrisation_put_on_after_convert_outlives_revert(norm: str, place: str) -> None:
    make, path, weight, shape = MADE[place]
    x = torch.randn(shape, dtype=torch.float64)
    inputs = (x,) if make is mlp else (x, x, x)
    models = make(), make()
    ap.convert(models[0], FA)
    for model in models:
        torch.manual_seed(0)
        NORMS[norm](model.get_submodule(path), weight)
        model.eval()
    model, plain = models
    want = gradients(plain, *inputs)
    with ap.rules_off(model):
        assert_equal(gradients(model, *inputs), want)
    by_rule = gradients(model, *inputs)
    assert by_rule.keys() == want.keys()
    if make is mlp:  # what lies below hears the feedback, not the parametrised weight
        leaf = x.clone().requires_grad_()
        model[0](leaf).sum().backward()
        assert torch.allclose(leaf.grad, model[0].B.sum(0).expand(3, 6))
    ap.revert(model)
    assert_equal(gradients(model, *inputs), want)
    assert not any(isinstance(m, Role) for m in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()
    for either in models:
        parametrize.remove_parametrizations(either.get_submodule(path), weight)
    assert_same_model(model, plain)
    if make is mlp:
        ap.convert(model, FA)  # and again, now that it is an ordinary map


@pytest.mark.parametrize("norm", NORMS)
def test_a_parametrisation_that_is_taken_off_again_leaves_the_rule(norm: str) -> None:
    model, plain = ap.convert(mlp(), FA), ap.convert(mlp(), FA)
    for linear in (model[0], model[2]):
        NORMS[norm](linear)
        parametrize.remove_parametrizations(linear, "weight")
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_equal(gradients(model, x), gradients(plain, x))
    assert type(ap.revert(model)[0]) is nn.Linear


def test_a_module_that_is_parametrised_already_may_be_a_tap_or_the_output() -> None:
    model = mlp()
    for linear in (model[0], model[2]):
        parametrizations.weight_norm(linear)
    with pytest.raises(ap.RuleError, match="ParametrizedLinear"):
        ap.convert(model, FA)
    rules = {"0": ap.DirectFeedback(granularity="block", features=8)}
    ap.convert(model, rules, output="2")
    x = torch.randn(3, 6, dtype=torch.float64)
    whole = gradients(model, x)
    for linear in (model[0], model[2]):
        parametrize.remove_parametrizations(linear, "weight")
    plain = mlp()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "B" not in k})
    ap.convert(plain, rules, output="2")
    want = gradients(plain, x)
    assert_equal(gradients(model, x), want)
    assert_equal({"0.bias": whole["0.bias"]}, {"0.bias": want["0.bias"]})
    assert [type(m) for m in ap.revert(model)] == [nn.Linear, nn.Tanh, nn.Linear]


def test_a_model_that_was_sharded_after_convert_is_reverted(tmp_path: Path) -> None:
    def check() -> None:
        model, plain = ap.convert(mlp(), FA), mlp()
        mesh = distributed.init_device_mesh("cpu", (1,))
        for linear in (model[0], model[2]):
            fully_shard(linear, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x = torch.randn(3, 6, dtype=torch.float64)
        want = gradients(plain, x)

        def whole() -> dict[str, Tensor]:
            return {n: g.full_tensor() for n, g in gradients(model, x).items()}

        assert not torch.allclose(whole()["0.weight"], want["0.weight"])
        with ap.rules_off(model[0]), ap.rules_off(model[2]):
            assert_equal(whole(), want)
        ap.revert(model)
        assert_equal(whole(), want)
        assert isinstance(model[0], FSDPModule) and not isinstance(model[0], Role)

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        check()
    finally:
        distributed.destroy_process_group()


def test_a_parametrised_feedback_is_refused_before_anything_is_reverted() -> None:
    model = ap.convert(mlp(), ap.KolenPollack())
    parametrizations.weight_norm(model[2], "B")
    types = [type(m) for m in model.modules()]
    with pytest.raises(ap.RuleError, match="remove_parametrizations") as caught:
        ap.revert(model)
    assert "B of 2" in one_line(caught)
    assert [type(m) for m in model.modules()] == types and "B" in model[0]._parameters
    parametrize.remove_parametrizations(model[2], "B")
    assert_same_model(ap.revert(model), mlp())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("first", ["convert", "norm"])
def test_the_older_weight_norm_works_before_and_after_convert(first: str) -> None:
    model, plain = mlp(), mlp()
    steps = [lambda: ap.convert(model, FA), lambda: nn.utils.weight_norm(model[0])]
    for step in steps if first == "convert" else steps[::-1]:
        step()
    nn.utils.weight_norm(plain[0])
    x = torch.randn(3, 6, dtype=torch.float64)
    want = gradients(plain, x)
    with ap.rules_off(model):
        assert_equal(gradients(model, x), want)
    assert not torch.allclose(gradients(model, x)["0.weight_v"], want["0.weight_v"])
    ap.revert(model)
    assert_equal(gradients(model, x), want)
    nn.utils.remove_weight_norm(model[0])
    assert type(model[0]) is nn.Linear and isinstance(model[0].weight, nn.Parameter)


def test_a_pruned_weight_keeps_its_mask() -> None:
    model, plain = ap.convert(mlp(), FA), mlp()
    for either in (model, plain):
        prune.l1_unstructured(either[0], "weight", amount=0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert not torch.allclose(
        gradients(model, x)["0.weight_orig"], gradients(plain, x)["0.weight_orig"]
    )
    assert_equal(gradients(ap.revert(model), x), gradients(plain, x))
    assert torch.equal(model[0].weight == 0, plain[0].weight == 0)


# --- replaced and resized


def grow(linear: nn.Linear, rows: int) -> None:
    """Do what resizing a vocabulary does to a tied head: the same module, another weight."""
    linear.weight = nn.Parameter(torch.randn(rows, linear.in_features, dtype=torch.float64))
    linear.bias = nn.Parameter(torch.zeros(rows, dtype=torch.float64))


@pytest.mark.parametrize(
    "rule",
    [FA, ap.SignSymmetry(variant="frsf"), ap.KolenPollack(), ap.WeightMirror()],
    ids=lambda rule: type(rule).__name__,
)
def test_a_weight_of_another_shape_is_refused_where_it_is_called(rule: ap.AbstractRule) -> None:
    model, x = ap.convert(mlp(), rule), torch.randn(3, 6, dtype=torch.float64)
    grow(model[2], 7)
    with pytest.raises(ap.RuleError, match=r"\(7, 8\).*\(5, 8\).*revert\(model\)") as caught:
        model(x)
    assert one_line(caught).startswith("2: ")
    with torch.no_grad():
        assert model(x).shape == (3, 7)
    plain = copy.deepcopy(ap.revert(model))
    ap.convert(model, rule)
    assert_equal({n: g for n, g in gradients(model, x).items() if n == "2.weight"},
                 {n: g for n, g in gradients(plain, x).items() if n == "2.weight"})  # fmt: skip


def test_rules_without_feedback_follow_a_weight_of_another_shape() -> None:
    model, x = ap.convert(mlp(), ap.SignSymmetry()), torch.randn(3, 6, dtype=torch.float64)
    grow(model[2], 7)
    plain = copy.deepcopy(model)
    got = gradients(model, x)
    ap.convert(ap.revert(plain), ap.SignSymmetry())
    assert_equal(got, gradients(plain, x))


BROADCAST = [
    ap.DirectFeedback(),
    ap.DirectFeedback(pass_through="pure", feedback="independent"),
    ap.DirectFeedback(granularity="block"),
    ap.GrAPE(),
]


@pytest.mark.parametrize("rule", BROADCAST, ids=lambda r: f"{type(r).__name__}-{r.takes}")
@pytest.mark.parametrize("how", ["replaced", "resized", "reverted"])
def test_an_output_that_changed_is_refused_in_the_pass_and_revert_helps(
    rule: ap.AbstractRule, how: str
) -> None:
    model = ap.convert(tiny(), rule, output="head")
    if how == "replaced":
        model.head = nn.Linear(8, 9).double()
    elif how == "resized":
        model.head.weight = nn.Parameter(torch.randn(9, 8, dtype=torch.float64))
    else:
        ap.revert(model.head)
    with pytest.raises(ap.RuleError, match=r"revert\(model\)") as caught:
        gradients(model, TOKENS)
    one_line(caught)
    with ap.rules_off(model):
        exact = gradients(model, TOKENS)
    rows = {row.parameter: row for row in ap.explain(model).rows}
    assert (rows["head.weight"].rule, rows["head.weight"].transports) == ("Backprop", True)
    assert_equal(gradients(ap.revert(model), TOKENS), exact)
    assert not any(isinstance(m, Role) for m in model.modules())
    gradients(ap.convert(model, rule, output="head"), TOKENS)


def test_a_tapped_weight_of_another_shape_is_refused() -> None:
    model = ap.convert(mlp(), {"0": ap.DirectFeedback()}, output="2")
    model[0].weight = nn.Parameter(torch.randn(8 * 2, 6, dtype=torch.float64))
    model[0].bias = None
    with pytest.raises(ap.RuleError, match=r"0: its weight has the shape \(16, 6\)"):
        model(torch.randn(3, 6, dtype=torch.float64))


def test_a_replaced_map_is_plain_backprop_and_explained_as_such() -> None:
    model, x = ap.convert(mlp(), FA), torch.randn(3, 6, dtype=torch.float64)
    model[2] = nn.Linear(8, 4).double()
    row = next(row for row in ap.explain(model).rows if row.parameter == "2.weight")
    assert (row.rule, row.signal, row.feedback, row.transports) == ("Backprop", "exact", None, True)
    plain = copy.deepcopy(model)
    want = gradients(ap.revert(plain), x)
    assert_equal({"0.weight": gradients(model, x)["0.weight"]}, {"0.weight": want["0.weight"]})
    assert type(ap.revert(model)[0]) is nn.Linear


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_that_hugging_face_resized(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=11, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(6)[None]
    ap.convert(model, FA)
    model.resize_token_embeddings(13)
    rules = {row.parameter: row.rule for row in ap.explain(model).rows}
    if tied:  # the same head with another weight
        with pytest.raises(ap.RuleError, match=r"lm_head: its weight .*revert\(model\)") as caught:
            model(ids, labels=ids)
        one_line(caught)
    else:  # another head
        assert rules["lm_head.weight"] == rules["transformer.wte.weight"] == "Backprop"
        model(ids, labels=ids).loss.backward()
    ap.convert(ap.revert(model), FA)
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.B.shape == (13, 8)


@pytest.mark.filterwarnings("ignore")  # torch means to move all of it to another package
def test_a_model_is_quantised_after_revert_and_refused_in_one_line_before() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = ap.convert(mlp().float(), FA)
    with pytest.raises(ap.RuleError, match=r"quantise altprop.revert\(copy.deepcopy\(model\)\)"):
        quantization.quantize_dynamic(model, {nn.Linear})
    assert not hasattr(model[0], "qconfig")
    served = ap.revert(copy.deepcopy(model))
    small = quantization.quantize_dynamic(served, {nn.Linear})
    assert "quantized" in type(small[0]).__module__ and "quantized" in type(small[2]).__module__
    assert isinstance(model[0], Role)  # the one that trains was left alone


# --- LoRA


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", [FA, ap.KolenPollack(), *BROADCAST[:2], ap.AEP()],
                         ids=lambda r: type(r).__name__)  # fmt: skip
@pytest.mark.parametrize("first", ["lora", "convert"])
def test_a_merged_lora_model_is_switched_off_explained_and_reverted(rule: Any, first: str) -> None:
    peft = pytest.importorskip("peft")
    stack = isinstance(rule, ap.AbstractEstimator)

    def adapted(model: nn.Module) -> Any:
        config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
        torch.manual_seed(1)
        return peft.get_peft_model(model, config).double()

    def converted(model: Any, prefix: str = "") -> Any:
        if stack:
            return ap.convert(model, {f"{prefix}blocks": rule})
        return ap.convert(model, rule, output=f"{prefix}head")

    model = converted(tiny()) if first == "convert" else tiny()
    model = adapted(model)
    if first == "lora":
        converted(model, "base_model.model.")
    plain = adapted(tiny())
    with ap.rules_off(model):
        assert_equal(gradients(model, TOKENS), gradients(plain, TOKENS))
    by_rule = gradients(model, TOKENS)
    adapters = {name for name in by_rule if name.endswith("weight") and "lora" in name}
    assert adapters == set(gradients(plain, TOKENS))
    merged, want = model.merge_and_unload(), plain.merge_and_unload()
    for either in (merged, want):
        either.requires_grad_(True)
    exact = gradients(want, TOKENS)
    with ap.rules_off(merged):
        got = gradients(merged, TOKENS)
        assert_equal({name: got[name] for name in exact}, exact)
    rules = {row.parameter: row.rule for row in ap.explain(merged).rows}
    assert rules["blocks.0.first.up.weight"] == type(rule).__name__
    assert_equal(gradients(ap.revert(merged), TOKENS), exact)
    assert [type(m) for m in merged.modules()] == [type(m) for m in tiny().modules()]
    gradients(converted(merged), TOKENS)
