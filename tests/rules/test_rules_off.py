"""rules_off: exact inside whatever it is given, nothing outside of it, and an error for nothing.

The oracles are backprop through an unconverted twin, a conversion whose patterns leave the same
part out, and, for equilibria, the adjoint equation solved as a dense linear system.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import altprop as ap
from conversions import TOKENS, assert_equal, gradients, tiny
from systems import TIGHT, System, dense, error, size

RULES = [
    ap.FeedbackAlignment(std=0.5),
    ap.SignSymmetry(variant="brsf"),
    ap.KolenPollack(),
    ap.DirectFeedback(),
    ap.DirectFeedback(pass_through="pure", feedback="independent"),
    ap.DirectFeedback(granularity="block", calibrate_every=2),
    ap.DirectFeedback(granularity="sublayer"),
    ap.BlockDirectFeedback(),
    ap.GrAPE(),
]
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "child": lambda model: model.blocks[0],
    "grandchild": lambda model: model.blocks[0].first,
    "slice": lambda model: nn.Sequential(*model.blocks[:2]),
    "copy": lambda model: copy.deepcopy(model.blocks[0]),
    "pickle": lambda model: pickle.loads(pickle.dumps(model.blocks[0])),
    "copy of the whole": lambda model: copy.deepcopy(model).blocks[0],
    "moved": lambda model: nn.Sequential(nn.Linear(8, 8).double(), model.blocks[1], nn.Tanh()),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_any_part_alone_is_exactly_backprop(rule: ap.AbstractRule, way: str) -> None:
    part = WAYS[way](ap.convert(tiny(), rule, output="head"))
    torch.manual_seed(1)
    plain = WAYS[way](tiny())
    plain.load_state_dict({k: v for k, v in part.state_dict().items() if k in plain.state_dict()})
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    broadcast_inside = way == "grandchild" and rule in RULES[5:6] + RULES[8:]
    if broadcast_inside:  # the tap is on the block around it: there is nothing in here
        with pytest.raises(ap.RuleError, match="nothing to switch off"), ap.rules_off(part):
            pass
        return
    with ap.rules_off(part):
        assert_equal(gradients(part, x), gradients(plain, x))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_part_switched_off_is_as_if_it_had_got_no_rule(rule: ap.AbstractRule) -> None:
    model = ap.convert(tiny(), rule, output="head")
    rest = {"blocks.0": rule}
    if isinstance(rule, ap.AbstractTransport):
        rest["head"] = rule
    without = ap.convert(tiny(), rest, output="head")
    with ap.rules_off(model.blocks[1]):
        got = gradients(model, TOKENS)
    want = gradients(without, TOKENS)
    assert_equal(got, want)
    on = [gradients(model, TOKENS) for _ in range(2)]
    assert any(name not in want or not torch.equal(on[0][name], want[name]) for name in on[0])
    twin = ap.convert(tiny(), rule, output="head")
    if all(
        torch.equal(on[0][name], on[1][name]) for name in on[0]
    ):  # nothing drawn, nothing counted
        assert_equal(on[1], gradients(twin, TOKENS))


def test_the_whole_switched_off_counts_no_pass_and_an_exception_switches_on_again() -> None:
    rule = ap.DirectFeedback(granularity="block", calibrate_every=2)
    model, twin = (ap.convert(tiny(), rule, output="head") for _ in range(2))
    plain = gradients(tiny(), TOKENS)
    with pytest.raises(ZeroDivisionError), ap.rules_off(model):
        assert_equal(gradients(model, TOKENS), plain)
        with ap.rules_off(model.blocks[0]):
            pass
        assert_equal(gradients(model, TOKENS), plain)
        1 / 0  # noqa: B018
    for _ in range(2):
        assert_equal(gradients(model, TOKENS), gradients(twin, TOKENS))


def test_a_drop_in_layer_is_switched_off_in_any_part() -> None:
    layers = [ap.LocalLinear(4, 4, method=method, seed=0) for method in ("fa", "sign_sym")]
    model = nn.Sequential(nn.Sequential(*layers), ap.LocalLinear(4, 4, method="fa")).double()
    plain = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))).double()
    plain.load_state_dict({k: v for k, v in model[0].state_dict().items() if "weight" in k})
    x = torch.randn(3, 4, dtype=torch.float64)
    for part in (model[0], copy.deepcopy(model[0])):
        with ap.rules_off(part):
            assert_equal(gradients(part, x), gradients(plain, x))
        pair = [gradients(m, x)["0.weight"].flatten() for m in (part, plain)]
        assert float(F.cosine_similarity(*pair, dim=0)) < 0.99


@pytest.mark.parametrize("part", ["norm", "head", "embed"])
def test_nothing_to_switch_off_is_an_error_of_one_line(part: str) -> None:
    model = ap.convert(tiny(), ap.DirectFeedback(granularity="block"), output="head")
    with pytest.raises(ap.RuleError, match="give rules_off the module") as caught:
        with ap.rules_off(model.get_submodule(part)):
            raise AssertionError("never entered")
    assert "\n" not in str(caught.value)
    with ap.rules_off(ap.convert(nn.Linear(2, 2), ap.Backprop())):
        pass  # converted: its rule is exact


def test_a_tap_alone_learns_nothing_unless_it_is_switched_off_or_reverted() -> None:
    model = ap.convert(tiny(), ap.DirectFeedback(granularity="block"), output="head")
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    with pytest.raises(ap.RuleError, match="rules_off .*or revert this part"):
        model.blocks[0](x)
    with torch.no_grad():
        model.blocks[0](x)  # where nothing learns
    want = gradients(tiny().blocks[0], x)
    with ap.rules_off(model):
        assert_equal(gradients(model.blocks[0], x), want)
    assert_equal(gradients(ap.revert(model.blocks[0]), x), want)


def test_a_compiled_part_is_switched_off_too() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    ap.convert(model, ap.FeedbackAlignment(std=0.5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def by_compiled() -> dict[str, Tensor]:
        return {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, x).items()}

    on = gradients(model, x)
    with warnings.catch_warnings():  # torch's compiler warns of what it does itself
        warnings.simplefilter("ignore")
        with ap.rules_off(model[0]):
            assert_equal(by_compiled(), gradients(model, x))
        assert_equal(by_compiled(), on)
    torch._dynamo.reset()


# stacks


def stacked(estimator: ap.AbstractEstimator) -> tuple[nn.Sequential, nn.Sequential]:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    model = nn.Sequential(nn.Linear(4, 4), blocks, nn.Linear(4, 2)).double()
    return ap.convert(model, {"1": estimator}), ap.revert(copy.deepcopy(model))


def test_the_blocks_of_a_stack_are_switched_off_by_whatever_holds_them_all() -> None:
    model, plain = stacked(ap.EP())
    x = torch.randn(5, 4, dtype=torch.float64)
    want, biased = gradients(plain, x), gradients(model, x)
    assert not torch.allclose(biased["0.weight"], want["0.weight"], rtol=1e-3)
    for part in (model, model[1], nn.ModuleList(model[1])):
        with ap.rules_off(part):
            assert_equal(gradients(model, x), want)
    assert_equal(gradients(model, x), biased)
    copied = copy.deepcopy(model[1])
    with ap.rules_off(copied):
        assert_equal(gradients(copied, x), gradients(plain[1], x))


def test_one_block_of_a_stack_alone_is_exact_and_among_the_others_refused() -> None:
    model, plain = stacked(ap.AEP())
    x = torch.randn(5, 4, dtype=torch.float64)
    for index in range(3):
        with ap.rules_off(model[1][index]):
            assert_equal(gradients(model[1][index], x), gradients(plain[1][index], x))
            with pytest.raises(ap.RuleError, match="holds all blocks of the stack") as caught:
                model(x)
        assert f"off in 1.{index}" in str(caught.value) and "\n" not in str(caught.value)
    model(x).sum().backward()


# equilibria


@pytest.mark.parametrize(
    "estimator",
    [
        ap.EP(),
        ap.AEP(),
        ap.OneStep(),
        ap.DyadicEP(),
        ap.HolomorphicEP(),
        ap.Implicit(tol=0.1),
        ap.PublishedEP(nudge="linear"),
        ap.PublishedAEP(nudge="linear"),
        ap.EP(nudge="cost"),
    ],
    ids=lambda e: f"{type(e).__name__}-{getattr(e, 'nudge', '')}",
)
def test_an_equilibrium_has_the_exact_adjoint_whatever_its_estimator(
    estimator: ap.AbstractEstimator,
) -> None:
    torch.manual_seed(0)
    dynamics = ap.DampedAttention(4, heads=2).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    s = System(dynamics, x, lambda z: z.tanh().square().sum())
    z, J, g = dense(s)
    a = -torch.linalg.solve(J.T, g).view_as(z)
    parts = torch.autograd.grad(dynamics(z, x), list(dynamics.parameters()), a)
    names = [f"dynamics.{name}" for name, _ in dynamics.named_parameters()]
    block = s.block(estimator)
    with ap.rules_off(nn.ModuleDict({"inner": nn.Sequential(block)})):
        got = gradients(block, x)
    assert_equal(got, dict(zip(names, parts, strict=True)), 1e-8)
    assert block.estimator is estimator
    assert float(block.certificate.adjoint_residual.max()) <= 1e-10


def test_a_long_adjoint_is_judged_by_its_own_length() -> None:
    """Where `a` is much longer than `g`, rounding alone leaves more than any small part of `g`."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(32, 32)).Q
    J = -(q * torch.logspace(-5, 0, 32)) @ q.T
    dynamics = ap.from_function(lambda z, x: z @ J.T + x)
    block = ap.Equilibrium(dynamics, ap.GMRES(tol=1e-4), ap.EP())
    leaf, g = (torch.randn(3, 32) @ J.T).requires_grad_(), torch.randn(3, 32)
    with ap.rules_off(block):
        block(leaf).backward(g)
    seen = block.certificate
    length, left = size(leaf.grad) / size(g), size(seen.adjoint_remainder)
    assert float(length.min()) > 100 and float(left.max()) > 1e-6
    torch.testing.assert_close(seen.adjoint_residual, left / (1 + length), rtol=1e-3, atol=0)


def test_bptt_stays_for_it_is_exact_for_its_own_relaxation() -> None:
    solver = ap.Euler(step=0.3, max_steps=4, tol=0)
    dynamics = ap.DampedAttention(4, heads=2).double()
    block = ap.Equilibrium(dynamics, solver, ap.BPTT(), on_failure="accept")
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    z = dynamics.start(x)
    for _ in range(4):
        z = z + 0.3 * dynamics(z, x)
    z.tanh().square().sum().backward()
    want = {f"dynamics.{n}": p.grad.clone() for n, p in dynamics.named_parameters()}
    with ap.rules_off(block):
        assert_equal(gradients(block, x), want)


@pytest.mark.parametrize("phases", ["sweep", "synchronous"])
@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_a_deep_layered_system_in_float32_is_backprop_while_switched_off(
    phases: str, gain: float
) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(12)]
    for block in blocks:
        nn.init.kaiming_normal_(block[0].weight).data.mul_(gain)
    model = ap.Equilibrium(ap.Layered(copy.deepcopy(blocks), phases), ap.Anderson(), ap.EP())
    plain, x, found = nn.Sequential(*blocks), torch.randn(3, 16), []
    with ap.rules_off(model):
        for run in (model, plain):
            leaf = x.clone().requires_grad_()
            run(leaf).square().mean().backward()
            found.append([leaf.grad, *(p.grad for p in run.parameters())])
    assert max(map(error, *found)) <= 1e-4


def test_rules_and_equilibria_of_one_model_are_switched_off_together() -> None:
    block = ap.Equilibrium(ap.DampedAttention(4, heads=2), TIGHT, ap.EP())
    model = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 3)).double()
    exact = copy.deepcopy(model)
    exact[1].estimator = ap.Implicit(tol=1e-11)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    ap.convert(model, {"0": ap.FeedbackAlignment(), "2": ap.FeedbackAlignment()})
    with ap.rules_off(model):
        assert_equal(gradients(model, x), gradients(exact, x), 1e-8)
    with ap.rules_off(model[1]):
        part = gradients(model, x)
    error = F.cosine_similarity(
        part["0.weight"].flatten(), gradients(exact, x)["0.weight"].flatten(), 0
    )
    assert float(error) < 0.9
