"""Converting a stack of a model's own blocks: backprop's gradient by AEP, or an honest refusal."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from conversions import assert_equal, assert_same_model, gradients
from systems import Gradients, cosine, worst


class Chain(nn.Module):
    """Blocks with a mask, a tuple as output, and something to read in between."""

    def __init__(self, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.read_in = nn.Linear(4, 6)
        self.layers = nn.ModuleList(Step(dropout) for _ in range(depth))
        self.read_out = nn.Linear(6, 2)
        self.between: list[Tensor] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.read_in(x)
        self.between = []
        for layer in self.layers:
            h, _ = layer(h, mask=mask)
            self.between.append(h)
        return self.read_out(h)


class Step(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:
        out = self.dropout(torch.tanh(self.linear(h)))
        return h + (out if mask is None else out * mask), "extra"


def chain(**settings: float) -> Chain:
    torch.manual_seed(0)
    return Chain(**settings).double()  # type: ignore[arg-type]


NEAR = ap.AEP(response=1e-4, tol=1e-9)


@pytest.mark.parametrize("solver", [None, ap.Anderson(), ap.Euler(step=1.0)])
def test_a_converted_model_keeps_its_output_names_and_backprops_gradient(
    solver: ap.AbstractSolver | None,
) -> None:
    model, x = chain(), torch.randn(5, 4).double()
    names, held = list(model.state_dict()), list(model.parameters())
    mask = torch.tensor([1.0, 0, 1, 1, 1, 0.5]).double()
    out, wanted = model(x, mask), gradients(model, x, mask)
    assert ap.convert(model, {"layers": NEAR}, solver=solver) is model
    assert torch.equal(model(x, mask), out)
    assert worst(gradients(model, x, mask), wanted) <= 1e-6
    assert list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), held, strict=True))
    ((path, equilibrium),) = ap.equilibria(model)
    assert path == "layers" and float(equilibrium.certificate.adjoint_residual.max()) <= 1e-9
    ap.revert(model)
    assert_equal(gradients(model, x, mask), wanted, tol=0)
    assert not list(ap.equilibria(model))


def test_dropout_draws_the_same_masks_in_every_phase() -> None:
    model, x = chain(dropout=0.5), torch.randn(5, 4).double()

    def drawn() -> tuple[Tensor, Gradients]:
        torch.manual_seed(7)
        out = model(x)
        torch.manual_seed(7)
        return out, gradients(model, x)

    wanted_out, wanted = drawn()
    ap.convert(model, {"layers": NEAR})
    out, got = drawn()
    assert torch.equal(out, wanted_out) and worst(got, wanted) <= 1e-6


def test_two_passes_before_one_backward_do_not_mix() -> None:
    model, x = chain(), torch.randn(2, 5, 4).double()
    wanted = torch.autograd.grad(
        model(x[0]).sum() + model(x[1]).square().sum(), model.layers[0].linear.weight
    )[0]
    ap.convert(model, {"layers": NEAR})
    (model(x[0]).sum() + model(x[1]).square().sum()).backward()
    got = model.layers[0].linear.weight.grad
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-6


def test_under_autocast_the_output_stays_and_the_gradient_is_close() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 4)
    exact = torch.autograd.grad(model(x).square().sum(), list(model.layers.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted_out = model(x)
    ap.convert(model, {"layers": ap.AEP()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert torch.equal(out, wanted_out)
    got = torch.cat([p.grad.flatten() for p in model.layers.parameters()])
    assert cosine(got, torch.cat([g.flatten() for g in exact])) >= 0.999


def test_without_autograd_the_blocks_are_called_as_they_are() -> None:
    model = ap.convert(chain(), {"layers": ap.AEP()})
    with torch.no_grad():
        model(torch.randn(5, 4).double())
    assert next(ap.equilibria(model))[1].certificate is None


def test_a_gradient_into_the_middle_of_a_stack_is_refused_and_not_lost() -> None:
    model = ap.convert(chain(), {"layers": ap.AEP()})
    model(torch.randn(5, 4).double())
    with pytest.raises(ap.RuleError, match=r"output of layers\.0 from outside"):
        model.between[0].sum().backward()


def test_something_between_the_blocks_is_refused() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(3, 3), gap=nn.ReLU(), b=nn.Linear(3, 3)))
    ap.convert(model, {"[ab]": ap.AEP()})
    with pytest.raises(ap.RuleError, match="b was not given the output of a"):
        model(torch.randn(2, 3))
    ap.revert(model)
    ap.convert(model, {"": ap.AEP()})
    model(torch.randn(2, 3)).sum().backward()


def test_activation_checkpointing_of_a_block_is_refused() -> None:
    model = ap.convert(chain(), {"layers": ap.AEP()})
    h = model.read_in(torch.randn(5, 4).double())
    for layer in model.layers:
        h, _ = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False)
    with pytest.raises(ap.RuleError, match="checkpointing"):
        h.sum().backward()


def test_an_embedding_at_the_bottom_is_refused_with_the_pattern_to_write() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))
    ap.convert(model, {"": ap.AEP()})
    with pytest.raises(ap.RuleError, match=r"given torch\.int64.*\{'\[1-9\]\*': AEP\(\)\}"):
        model(torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ("layer", "did you mean layers"),
        ("read_*.x", "no list of blocks for AEP"),
    ],
)
def test_a_stack_that_is_not_there_is_named(stack: str, says: str) -> None:
    model = chain()
    with pytest.raises(ap.RuleError, match=says):
        ap.convert(model, {stack: ap.AEP()})
    assert not list(ap.equilibria(model))


def test_an_estimator_without_a_pattern_says_which_one_to_write() -> None:
    with pytest.raises(ap.RuleError, match=r"write convert\(model, \{'layers': AEP\(\)\}\)"):
        ap.convert(chain(), ap.AEP())


def test_one_mapping_has_several_stacks_and_rules_for_the_rest() -> None:
    model, x = chain(depth=4), torch.randn(5, 4).double()
    rule = ap.FeedbackAlignment(std=0.5)
    ap.convert(model, {"layers.[01]": NEAR, "layers.2": ap.Backprop(), "layers": NEAR, "*": rule})
    assert [path for path, _ in ap.equilibria(model)] == ["layers.[01]", "layers"]
    rules = {row.parameter: row.rule for row in ap.explain(model).rows}
    assert [rules[f"layers.{i}.linear.weight"] for i in range(4)] == [
        "AEP",
        "AEP",
        "Backprop",
        "AEP",
    ]
    plain = ap.convert(chain(depth=4), {"read_*": rule})
    for either in (model, plain):
        either(x).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p.grad - q.grad).norm() / q.grad.norm()) <= 1e-6
    assert_same_model(ap.revert(model), ap.revert(plain))


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_converted_model_solves_its_own_stack(copying: object) -> None:
    model = ap.convert(chain(), {"layers": NEAR})
    other = copying(model)  # type: ignore[operator]
    x = torch.randn(5, 4).double()
    other(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model(x).sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad)
    ap.revert(other)
    assert list(ap.equilibria(model)) and not list(ap.equilibria(other))


def test_another_estimator_can_be_used_for_a_while() -> None:
    model, x = chain(), torch.randn(5, 4).double()
    wanted = torch.autograd.grad(model(x).sum(), model.layers[0].linear.weight)[0]
    ap.convert(model, {"layers": ap.EP()})
    with ap.using(model, estimator=ap.Implicit(tol=1e-12)):
        model(x).sum().backward()
    assert torch.allclose(model.layers[0].linear.weight.grad, wanted)


def test_rules_off_is_backprop_in_a_stack_and_revert_for_good() -> None:
    model, x = chain(), torch.randn(5, 4).double()
    weight = model.layers[0].linear.weight
    wanted = torch.autograd.grad(model(x).sum(), weight)[0]
    ap.convert(model, {"layers": ap.AEP()})
    with ap.rules_off(model):
        assert torch.equal(torch.autograd.grad(model(x).sum(), weight)[0], wanted)
    by_aep = torch.autograd.grad(model(x).sum(), weight)[0]
    assert cosine(by_aep, wanted) >= 0.99999 and not torch.equal(by_aep, wanted)
    ap.revert(model)
    assert torch.equal(torch.autograd.grad(model(x).sum(), weight)[0], wanted)


@pytest.mark.parametrize(
    "rules",
    [
        {"layers.1.linear": ap.FeedbackAlignment(), "layers": ap.AEP()},
        {"*.linear": ap.DirectFeedback(), "layers": ap.AEP()},
        {"layers.*": ap.BlockDirectFeedback(), "layers": ap.AEP()},
        {"layers": ap.AEP(), "layers.1.linear": ap.FeedbackAlignment()},
    ],
    ids=str,
)
def test_feedback_rules_and_a_stack_do_not_share_blocks(rules: dict[str, ap.AbstractRule]) -> None:
    with pytest.raises(ap.RuleError, match=r"layers\.1.*a level of a stack|taken by one before it"):
        ap.convert(chain(), rules, output="read_out")
