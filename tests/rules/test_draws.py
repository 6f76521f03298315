"""How feedback is drawn, and that every rule draws its own as its options say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from uneven import close

import altprop as ap


def drawn(init: str, shape: tuple[int, int], seed: int = 0, **options: float) -> Tensor:
    rule = ap.FeedbackAlignment(init=init, **options)
    layer = ap.convert(nn.Linear(shape[1], shape[0], dtype=torch.float64), rule, seed=seed)
    B: Tensor = layer.B
    assert B.shape == shape
    return B


@pytest.mark.parametrize("shape", [(200, 90), (90, 200)], ids=str)
def test_gaussian_entries_have_the_stated_size_whatever_the_shape(shape: tuple[int, int]) -> None:
    for options, std in (({}, 0.02), ({"std": 0.7}, 0.7)):
        B = drawn("gaussian", shape, **options) / std
        assert float(B.mean()) == pytest.approx(0, abs=4 / 18000**0.5)
        assert float(B.std()) == pytest.approx(1, abs=0.03)
        assert float((B**4).mean()) == pytest.approx(3, abs=0.3)
        assert float(B.norm(dim=1).std()) < 0.08 * shape[1] ** 0.5  # no row stands out


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)], ids=str)
def test_orthogonal_feedback_keeps_the_norm_times_its_scale(shape: tuple[int, int]) -> None:
    out, in_features = shape
    n = min(shape)
    for init, options, size in (
        ("orthogonal", {"std": 0.3}, 0.3 * math.sqrt(in_features)),
        ("orthogonal", {}, 0.02 * math.sqrt(in_features)),
        ("ortho_he", {}, math.sqrt(2 / out)),
        ("ortho_he", {"std": 5.0}, math.sqrt(2 / out)),
    ):
        B = drawn(init, shape, **options)
        gram = B.T @ B if out >= in_features else B @ B.T
        close(gram / size**2, torch.eye(n, dtype=torch.float64), 1e-5)  # drawn in float32


def uniform(values: list[float], low: float, high: float) -> None:
    """Assert, by Kolmogorov and Smirnov at one in a thousand, that values are uniform."""
    n = len(values)
    at = [(v - low) / (high - low) for v in sorted(values)]
    gap = max(max(abs(a - i / n), abs(a - (i + 1) / n)) for i, a in enumerate(at))
    assert gap < 1.95 / math.sqrt(n), gap


@pytest.mark.parametrize("init", ["orthogonal", "ortho_he"])
def test_orthogonal_draws_are_haar(init: str) -> None:
    # A 1 x 1 orthogonal matrix is a fair sign.
    positive = sum(float(drawn(init, (1, 1), seed)) > 0 for seed in range(200))
    assert 65 <= positive <= 135
    # Every coordinate of a uniform direction in three dimensions is uniform (Archimedes).
    for shape in ((3, 2), (2, 3)):
        many = [drawn(init, shape, seed) for seed in range(300)]
        size = math.sqrt(2 / shape[0]) if init == "ortho_he" else 0.02 * math.sqrt(shape[1])
        for row in range(shape[0]):
            for column in range(shape[1]):
                uniform([float(B[row, column]) / size for B in many], -1, 1)
    # In the plane turns and mirrored turns are equally many, and the turns' angle is uniform.
    plane = [drawn(init, (2, 2), seed) for seed in range(300)]
    assert 105 <= sum(float(torch.linalg.det(B)) > 0 for B in plane) <= 195
    uniform([math.atan2(float(B[1, 0]), float(B[0, 0])) for B in plane], -math.pi, math.pi)


@pytest.mark.parametrize(
    ("k", "in_features", "count"),
    [(None, 64, 4), (None, 40, 2), (None, 9, 1), (3, 9, 3), (20, 9, 9)],
)
def test_sparse_feedback_has_k_signed_entries_a_row_of_one_size(
    k: int | None, in_features: int, count: int
) -> None:
    options = {} if k is None else {"k": k}
    B = drawn("sparse", (200, in_features), std=0.3, **options)
    held = B != 0
    assert held.sum(1).tolist() == [count] * 200
    size = 0.3 * math.sqrt(in_features / count)
    close(B[held].abs(), torch.full((200 * count,), size).double(), 1e-6)
    share = float((B[held] > 0).double().mean())
    assert abs(share - 0.5) < 2.5 / math.sqrt(200 * count)
    # each column is as likely as another
    expected = 200 * count / in_features
    assert float((held.sum(0) - expected).abs().max()) <= 4.5 * math.sqrt(expected)
    # and the rows' norm is that of gaussian rows
    close(B.norm(dim=1), torch.full((200,), 0.3 * math.sqrt(in_features)).double(), 1e-6)


def test_every_place_and_every_seed_has_a_feedback_of_its_own() -> None:
    def feedback(seed: int) -> list[Tensor]:
        halves = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
        model = nn.ModuleDict({"a": halves[0], "b": halves[1]})
        ap.convert(model, ap.FeedbackAlignment(), seed=seed)
        return [linear.B for half in model.values() for linear in half]

    found = [*feedback(0), *feedback(1)]  # equal leaf names, equal shapes
    for i, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[:i])
    torch.manual_seed(123)  # and nothing else that the program draws matters
    for one, again in zip(found[:4], feedback(0), strict=True):
        assert torch.equal(one, again)


# every rule


OUT, IN, CLASSES = 48, 80, 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(IN, OUT), nn.Tanh())])
        self.head = nn.Linear(OUT, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](x))


def feedback(rule: ap.AbstractRule) -> Tensor:
    """Return the feedback at the first map, or at the first block."""
    model = ap.convert(Net(), rule, output="head")
    found = [t for n, t in model.state_dict().items() if n.rpartition(".")[2].startswith("B")]
    B = next(t for t in found if t.dim() == 2)
    assert len(B) == OUT
    return B


DRAWN = [ap.FeedbackAlignment, ap.KolenPollack, ap.DirectFeedback, ap.BlockDirectFeedback]
PLAIN = [ap.WeightMirror, ap.AlignedFeedback]


@pytest.mark.parametrize("rule", [*DRAWN, *PLAIN, ap.GrAPE])
def test_std_is_the_size_of_the_entries_and_0_02_unless_given(rule: type) -> None:
    for made, std in ((rule(), 0.02), (rule(std=0.7), 0.7)):
        assert float(feedback(made).square().mean().sqrt()) == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("rule", [*DRAWN, *PLAIN])
def test_init_names_the_drawing_and_k_a_sparse_rows_entries(rule: type) -> None:
    B = feedback(rule(init="orthogonal", std=0.3))
    gram = B @ B.T if len(B) <= B.shape[1] else B.T @ B
    torch.testing.assert_close(gram, 0.09 * B.shape[1] * torch.eye(len(gram)), atol=1e-4, rtol=0)
    B = feedback(rule(init="ortho_he"))
    assert float(torch.linalg.matrix_norm(B, 2)) == pytest.approx(math.sqrt(2 / OUT), rel=1e-4)
    B = feedback(rule(init="sparse"))
    assert (B != 0).sum(1).tolist() == [max(1, B.shape[1] // 16)] * OUT
    if rule in DRAWN:
        assert (feedback(rule(init="sparse", k=7)) != 0).sum(1).tolist() == [7] * OUT


DEFAULTS = [
    "FeedbackAlignment(init='gaussian', std=0.02, k=None)",
    "SignSymmetry(scale='frobenius', variant='sign')",
    "KolenPollack(init='gaussian', std=0.02, k=None)",
    "WeightMirror(probes=32, decay=1.0, init='gaussian', std=0.02)",
    "AlignedFeedback(probes=32, normalize=False, init='gaussian', std=0.02)",
    "DirectFeedback(granularity='matmul', error='logits', feedback='shared', "
    "pass_through='hybrid', calibrate_every=0, features=None, init='gaussian', std=0.02, k=None)",
    "BlockDirectFeedback(features=None, init='gaussian', std=0.02, k=None)",
    "GrAPE(probes=1, every=1, normalize='hidden', calibrate_every=0, "
    "error='logits', features=None, std=0.02)",
]


@pytest.mark.parametrize("text", DEFAULTS)
def test_defaults_are_those_of_the_papers_and_pages(text: str) -> None:
    assert repr(getattr(ap, text.partition("(")[0])()) == text


INF, NAN = math.inf, math.nan
WRONG: list[tuple[type, dict[str, Any]]] = [
    *((rule, {"std": v}) for rule in (*DRAWN, *PLAIN, ap.GrAPE) for v in (0.0, -0.1, INF, NAN)),
    *((rule, {"k": 0, "init": "sparse"}) for rule in DRAWN),
    *((rule, {"calibrate_every": v}) for rule in (ap.DirectFeedback, ap.GrAPE) for v in (1, -1)),
    (ap.WeightMirror, {"probes": 1}),
    (ap.WeightMirror, {"decay": -0.1}),
    (ap.WeightMirror, {"decay": INF}),
    (ap.AlignedFeedback, {"probes": 0}),
    (ap.BlockDirectFeedback, {"features": 0}),
    (ap.GrAPE, {"probes": 0}),
    (ap.GrAPE, {"every": 0}),
]


@pytest.mark.parametrize(("rule", "wrong"), WRONG)
def test_an_option_out_of_range_is_refused_by_name(rule: type, wrong: dict[str, Any]) -> None:
    with pytest.raises(ap.ConfigError, match=next(iter(wrong))):
        rule(**wrong)
    assert ap.WeightMirror(decay=0.0, probes=2).decay == 0.0  # a mirror may do without decay
