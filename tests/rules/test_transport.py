"""What each transport rule means, written from the papers and compared on maps that are not square.

Nothing here asks a rule for its matrix or for its feedback's gradient: the tests see what a module
receives, and formulas of plain tensors say what it should have been.
Shapes: `x` (..., in), `g` (..., out), `W` and `B` (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from uneven import close

import altprop as ap

SHAPES = [(3, 7), (7, 3), (4, 1), (1, 4)]  # (out, in)


@dataclass
class Pass:
    """One backward pass through a converted map: what went in, and what came out of it."""

    layer: nn.Linear
    x: Tensor
    g: Tensor
    W: Tensor
    B: Tensor | None
    to_x: Tensor

    @property
    def matrix(self) -> Tensor:
        """The matrix that the cotangents were multiplied by, solved for: `g M = to_x`."""
        return torch.linalg.lstsq(self.g.flatten(0, -2), self.to_x.flatten(0, -2)).solution


def run(rule: ap.AbstractRule, shape: tuple[int, int], layer: nn.Linear | None = None) -> Pass:
    """Send random cotangents through a map, 10 of them so that they determine the matrix."""
    out, in_features = shape
    if layer is None:
        layer = ap.convert(nn.Linear(in_features, out, dtype=torch.float64), rule)
    x = torch.randn(5, 2, in_features, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 2, out, dtype=torch.float64)
    B = getattr(layer, "B", None)
    layer.zero_grad()
    layer(x).backward(g)
    B = None if B is None else B.detach().clone()
    return Pass(layer, x.detach(), g, layer.weight.detach().clone(), B, x.grad)


def fixed(W: Tensor, B: Tensor | None) -> Tensor:
    return B


def signs(W: Tensor) -> Tensor:
    return (W > 0).double() - (W < 0).double()


def equal_columns(std: float) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`N(0, std²)` has columns of norm `std √out` on average: each column is given that norm."""

    def matrix(W: Tensor, B: Tensor | None) -> Tensor:
        columns = [c / math.sqrt(float(c @ c)) for c in B.unbind(1)]
        return std * math.sqrt(len(W)) * torch.stack(columns, 1)

    return matrix


# rule, and the matrix by which `g` is multiplied: from the weight, and from the drawn feedback
Formula = Callable[[Tensor, Tensor | None], Tensor]
TRANSPORTS: list[tuple[ap.AbstractTransport, Formula]] = [
    (ap.Backprop(), lambda W, B: W),
    (ap.FeedbackAlignment(), fixed),
    (ap.FeedbackAlignment(init="orthogonal"), fixed),
    (ap.FeedbackAlignment(init="ortho_he"), fixed),
    (ap.FeedbackAlignment(init="sparse", k=2), fixed),
    (ap.SignSymmetry(), lambda W, B: signs(W) * ((W**2).sum() / W.numel()).sqrt()),
    (ap.SignSymmetry(variant="usf"), lambda W, B: signs(W) * (W**2).mean().sqrt()),
    (ap.SignSymmetry(scale="fan_in"), lambda W, B: signs(W) * math.sqrt(2 / len(W[0]))),
    (ap.SignSymmetry(scale="none"), lambda W, B: signs(W)),
    (
        ap.SignSymmetry(variant="frsf"),
        lambda W, B: signs(W) * fixed(W, B) * (W**2).mean().sqrt(),
    ),
    (
        ap.SignSymmetry(scale="fan_in", variant="frsf"),
        lambda W, B: signs(W) * fixed(W, B) * math.sqrt(2 / len(W[0])),
    ),
    (ap.SignSymmetry(scale="none", variant="frsf"), lambda W, B: signs(W) * fixed(W, B)),
    (ap.KolenPollack(std=0.3), fixed),
    (ap.WeightMirror(probes=4, std=0.3), fixed),
    (ap.WeightMirror(probes=4, decay=0.25), fixed),
    (ap.AlignedFeedback(probes=4, std=0.3), fixed),
    (ap.AlignedFeedback(probes=4, std=0.3, normalize=True), equal_columns(0.3)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("rule", "matrix"), [pytest.param(*case, id=str(case[0])) for case in TRANSPORTS]
)
def test_a_map_sends_the_papers_matrix_and_learns_by_its_own_gradient(
    rule: ap.AbstractTransport, matrix: Formula, shape: tuple[int, int]
) -> None:
    done = run(rule, shape)
    close(done.to_x, done.g @ matrix(done.W, done.B))
    close(done.layer.weight.grad, torch.einsum("abo,abi->oi", done.g, done.x))
    close(done.layer.bias.grad, done.g.sum((0, 1)))
    # the matrix does not hang on what was sent: another pass has the same
    again = run(rule, shape, done.layer)
    close(again.to_x, again.g @ matrix(done.W, done.B))


@pytest.mark.parametrize(
    "rule",
    [
        ap.FeedbackAlignment(),
        ap.SignSymmetry(),
        ap.SignSymmetry(variant="brsf"),
        ap.DirectFeedback(),
        ap.BlockDirectFeedback(),
    ],
    ids=str,
)
def test_a_weight_whose_input_has_no_gradient_may_change_before_the_backward_pass(
    rule: ap.AbstractRule,
) -> None:
    def gradient(change: str) -> Tensor:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        model = ap.convert(nn.Sequential(block, nn.Linear(4, 2)), rule, output="1")
        out = model(torch.ones(5, 3)).square().sum()
        with torch.no_grad():
            for path in change.split():
                model.get_submodule(path).weight.mul_(0.5)  # as a bound on its norm would
        out.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.equal(gradient("0.0"), gradient(""))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient("0.2")  # that of an input with a gradient may not, as in nn.Linear


def test_what_is_kept_on_backprop_sends_its_weight_and_is_named_so() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).double()
    ap.convert(model, {"1": ap.Backprop(), "*": ap.FeedbackAlignment(std=0.5)})
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    above = torch.ones(6, 2, dtype=torch.float64) @ model[2].B
    close(model[0].bias.grad, (above @ model[1].weight.detach()).sum(0))
    lines = str(ap.explain(model)).splitlines()
    named = {line.split()[0]: line.split()[1] for line in lines if "." in line.split()[0]}
    assert named["1.weight"] == named["1.bias"] == "Backprop"
    assert named["0.weight"] == named["2.weight"] == "FeedbackAlignment"


@pytest.mark.parametrize("variant", ["sign", "usf", "brsf", "frsf"])
def test_a_weight_of_zero_has_no_sign_and_sends_nothing(variant: str) -> None:
    layer = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[1, 2] = 0
    rule = ap.SignSymmetry(variant=variant)
    M = run(rule, (3, 4), ap.convert(layer, rule)).matrix
    assert abs(float(M[1, 2])) < 1e-12 and int((M.abs() > 1e-12).sum()) == 11


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("scale", ["frobenius", "fan_in", "none"])
@pytest.mark.parametrize("variant", ["brsf", "frsf"])
def test_random_sizes_are_half_normal_and_new_at_every_pass_or_never(
    variant: str, scale: str, shape: tuple[int, int]
) -> None:
    rule = ap.SignSymmetry(scale=scale, variant=variant)
    sizes = []
    for seed in range(25):
        layer = ap.convert(nn.Linear(shape[1], shape[0], dtype=torch.float64), rule, seed=seed)
        W = layer.weight.detach()
        unit = {
            "frobenius": math.sqrt(float((W**2).mean())),
            "fan_in": math.sqrt(2 / shape[1]),
            "none": 1.0,
        }[scale]
        first, second = (run(rule, shape, layer).matrix for _ in range(2))
        assert torch.equal(first.sign(), W.sign())  # no size is negative
        same = (first / second - 1).abs() < 1e-9
        assert bool(same.all()) if variant == "frsf" else not bool(same.any())
        sizes.append(first.abs() / unit)
    found = torch.stack(sizes)
    n = found.numel()  # |N(0, 1)| has the mean √(2/π) and the mean square 1
    assert float(found.mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=2.5 / n**0.5)
    assert float((found**2).mean()) == pytest.approx(1, abs=5 / n**0.5)


# learned feedback


def test_kolen_pollack_gives_the_feedback_the_weights_gradient_in_memory_of_its_own() -> None:
    done = run(ap.KolenPollack(), (3, 7))
    B, W = done.layer.B, done.layer.weight
    close(B.grad, torch.einsum("abo,abi->oi", done.g, done.x))
    # what is done to one of the two must not be done to the other
    both = torch.autograd.grad(done.layer(done.x).sum(), [W, B])
    assert torch.equal(*both) and both[0].data_ptr() != both[1].data_ptr()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noise that rules draw in the test, in order."""
    found: list[Tensor] = []
    for rule in (ap.WeightMirror, ap.AlignedFeedback):

        def noise(self, site, generator, plain=rule.noise):
            found.append(plain(self, site, generator))
            return found[-1]

        monkeypatch.setattr(rule, "noise", noise)
    return found


NOISY = [ap.WeightMirror, ap.AlignedFeedback]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.25])
def test_the_mirrors_gradient_is_the_mean_of_centred_responses_to_centred_noise(
    shape: tuple[int, int], decay: float, heard: list[Tensor]
) -> None:
    rule = ap.WeightMirror(probes=6, decay=decay, std=0.3)
    again = run(rule, shape, run(rule, shape).layer)
    assert len(heard) == 2 and not torch.equal(*heard)
    p = heard[1].double()
    assert p.shape == (6, shape[1])
    # the layer's own answer, its bias included: only the centred part counts
    y = p @ again.W.T + again.layer.bias.detach()
    y, p = y - y.mean(0), p - p.mean(0)
    mean = sum(torch.outer(y[n], p[n]) for n in range(6)) / 6
    close(again.layer.B.grad, decay * again.B - mean, 1e-6)  # centred in float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_aligned_feedback_descends_one_minus_the_cosine_to_the_probes_estimate(
    shape: tuple[int, int], normalize: bool, heard: list[Tensor]
) -> None:
    rule = ap.AlignedFeedback(probes=6, std=0.3, normalize=normalize)
    again = run(rule, shape, run(rule, shape).layer)
    assert len(heard) == 2 and not torch.equal(*heard)
    p = heard[1].double()
    assert p.shape == (6, shape[1])
    estimate = sum(torch.outer(again.W @ q, q) for q in p) / 6
    B = again.B.requires_grad_()
    (1 - (B * estimate).sum() / ((B**2).sum() * (estimate**2).sum()).sqrt()).backward()
    close(again.layer.B.grad, B.grad, 1e-9)


def test_noise_has_unit_size_so_that_a_mirrors_gradient_rests_at_the_weight(
    heard: list[Tensor],
) -> None:
    done = run(ap.WeightMirror(probes=20000, decay=0.5), (3, 5))
    run(ap.AlignedFeedback(probes=20000), (3, 5))
    for noise in heard:
        assert float(noise.std()) == pytest.approx(1, abs=0.01)
        assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    towards = 0.5 * done.B - done.layer.B.grad  # → W as the probes grow many
    assert float((towards - done.W).norm() / done.W.norm()) < 0.05


@pytest.mark.parametrize("rule", NOISY)
def test_each_place_and_each_seed_hears_noise_of_its_own(rule: type, heard: list[Tensor]) -> None:
    for seed in (0, 1, 0):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        ap.convert(model, rule(probes=3), seed=seed)(torch.ones(2, 4)).sum().backward()
    *drawn, first, second = heard
    for i, noise in enumerate(drawn):
        assert all(not torch.equal(noise, known) for known in drawn[:i])
    assert torch.equal(first, drawn[0]) and torch.equal(second, drawn[1])


@pytest.mark.parametrize("rule", NOISY)
def test_probes_is_the_number_of_noise_vectors(rule: type, heard: list[Tensor]) -> None:
    for made in (rule(), rule(probes=5)):
        run(made, (3, 7))
    assert [tuple(p.shape) for p in heard] == [(32, 7), (5, 7)]


def test_a_feedback_of_zero_or_a_weight_of_zero_turns_nowhere() -> None:
    for zero in ("B", "weight"):
        layer = ap.convert(nn.Linear(4, 3).double(), ap.AlignedFeedback(probes=4))
        with torch.no_grad():
            getattr(layer, zero).zero_()
        done = run(ap.AlignedFeedback(probes=4), (3, 4), layer)
        assert not done.layer.B.grad.any()
