"""Modules whose forward is not their class's: compiled ones are converted within, others refused.

A gradient that equals backprop's, while a rule is said to be in force, is what none may leave.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, assert_same_model, gradients

RULES = [
    ap.FeedbackAlignment(std=1.0),
    ap.DirectFeedback("block", feedback="independent", std=0.5),
    ap.BlockDirectFeedback(std=0.5),
    ap.GrAPE(std=0.5),
    {"blocks.*.0": ap.SignSymmetry(), "blocks.*": ap.DirectFeedback("block", std=0.5)},
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def compiled(model: Net, blocks: bool, root: bool) -> Any:
    if blocks:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")  # type: ignore[assignment]
    return torch.compile(model, backend="eager") if root else model


@pytest.mark.parametrize(("blocks", "root"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_was_compiled_obeys_the_rule_with_the_feedback_of_what_was_not(
    rule: Any, blocks: bool, root: bool
) -> None:
    torch._dynamo.reset()
    want = gradients(ap.convert(net(), rule, output="head"), X)
    model = compiled(net(), blocks, root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        ap.convert(model, rule, output="head")
        got = {n.replace("_orig_mod.", ""): g for n, g in gradients(model, X).items()}
        assert any(row.signal != "exact" for row in ap.explain(model).rows)
        plain = gradients(ap.revert(model), X)
    assert_equal(got, want)
    assert_equal({n.replace("_orig_mod.", ""): g for n, g in plain.items()}, gradients(net(), X))
    torch._dynamo.reset()


def test_paths_may_be_written_as_torch_compile_makes_them() -> None:
    model = compiled(net(), True, True)
    rules = {"_orig_mod.blocks.0": ap.Backprop(), "*": ap.DirectFeedback(std=0.5)}
    ap.convert(model, rules, output="_orig_mod.head")
    rules = {"blocks.0": ap.Backprop(), "*": ap.DirectFeedback(std=0.5)}
    told = ap.explain(ap.convert(net(), rules, output="head")).rows
    assert [row.signal for row in ap.explain(model).rows] == [row.signal for row in told]


def wrapped(module: nn.Module) -> None:
    """Put a forward on an instance, as patches and hooks do."""
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)


def hooked(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


@pytest.mark.parametrize("wrap", [wrapped, hooked])
@pytest.mark.parametrize(
    ("rule", "path"),
    [
        (ap.FeedbackAlignment(), "blocks.1.2"),  # a map
        (ap.DirectFeedback(), "head"),  # where the error is taken
        (ap.DirectFeedback(), ""),  # what opens the pass
        (ap.DirectFeedback("block"), "blocks.0"),  # a tap
        (ap.BlockDirectFeedback(), "blocks.1"),  # a block with an error of its own
        ({"blocks": ap.AEP()}, "blocks.0"),  # a level of a stack
    ],
    ids=str,
)
def test_a_forward_on_the_instance_is_refused_in_one_line(
    rule: Any, path: str, wrap: Callable[[nn.Module], None]
) -> None:
    model = net()
    wrap(model.get_submodule(path))
    held = model.get_submodule(path).__dict__["forward"]
    with pytest.raises(ap.RuleError) as caught:
        ap.convert(model, rule, output="head")
    place = path or "the model itself"
    assert str(caught.value).count("\n") == 1 and f"- {place}: a forward of its own" in str(caught)
    assert model.get_submodule(path).__dict__["forward"] is held
    assert not any(hasattr(m, "_altprop") for m in model.modules())


def test_a_forward_on_a_module_without_a_role_is_nobodys_concern() -> None:
    model = net()
    wrapped(model)
    wrapped(model.blocks[0])
    ap.convert(model, ap.FeedbackAlignment(std=1.0))
    assert_equal(
        gradients(model, X), gradients(ap.convert(net(), ap.FeedbackAlignment(std=1.0)), X)
    )


def test_what_undone_hooks_leave_on_the_instance_is_no_other_forward() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, rule = net(), ap.DirectFeedback(std=0.5)
    for module in model.modules():
        hooked(module)
    hooks.remove_hook_from_module(model, recurse=True)
    assert "forward" in model.head.__dict__
    ap.convert(model, rule, output="head")
    assert_equal(gradients(model, X), gradients(ap.convert(net(), rule, output="head"), X))


def test_revert_names_a_forward_that_was_put_there_since_and_changes_nothing() -> None:
    accelerate = pytest.importorskip("accelerate")
    rule = ap.DirectFeedback(std=0.5)
    model = ap.convert(net().float(), rule, output="head")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    want = gradients(prepared, X.float())
    with pytest.raises(ap.RuleError, match=r"the model itself: .*unwrap_model\(model, keep_fp"):
        ap.revert(prepared)
    assert_equal(gradients(prepared, X.float()), want)
    alone = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    same = ap.convert(net().float(), rule, output="head")
    assert_equal(gradients(alone, X.float()), gradients(same, X.float()), 1e-6)
    assert type(ap.revert(alone)) is Net and "forward" not in alone.__dict__
    assert_equal(gradients(alone, X.float()), gradients(net().float(), X.float()), 1e-6)


def test_revert_of_a_map_whose_forward_was_put_around_the_rule_is_refused_too() -> None:
    model = ap.convert(net(), ap.FeedbackAlignment())
    wrapped(model.head)
    with pytest.raises(ap.RuleError, match=r"head: a forward .* after convert.*nothing was rev"):
        ap.revert(model)
    del model.head.forward
    assert_same_model(ap.revert(model), net())


def test_a_converted_forward_shows_the_signature_of_its_class_and_is_nobodys_wrapper() -> None:
    model = ap.convert(net(), ap.DirectFeedback(), output="head")
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert inspect.unwrap(type(model).forward) is type(model).forward
