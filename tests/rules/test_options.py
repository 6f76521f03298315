"""Every rule draws its feedback as its options say, and without any as the pages say."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

import altprop as ap

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
def test_init_names_the_drawing(rule: type) -> None:
    B = feedback(rule(init="orthogonal", std=0.3))
    gram = B @ B.T if len(B) <= B.shape[1] else B.T @ B
    torch.testing.assert_close(gram, 0.09 * B.shape[1] * torch.eye(len(gram)), atol=1e-4, rtol=0)
    B = feedback(rule(init="ortho_he"))
    assert float(torch.linalg.matrix_norm(B, 2)) == pytest.approx(math.sqrt(2 / OUT), rel=1e-4)
    B = feedback(rule(init="sparse"))
    assert (B != 0).sum(1).tolist() == [max(1, B.shape[1] // 16)] * OUT


@pytest.mark.parametrize("rule", DRAWN)
def test_k_is_the_number_of_a_sparse_rows_entries(rule: type) -> None:
    assert (feedback(rule(init="sparse", k=7)) != 0).sum(1).tolist() == [7] * OUT


@pytest.mark.parametrize("rule", [ap.WeightMirror, ap.AlignedFeedback])
def test_probes_is_the_number_of_noise_vectors(rule: type, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = rule.noise  # type: ignore[attr-defined]
    monkeypatch.setattr(
        rule, "noise", lambda self, *rest: seen.append(plain(self, *rest)) or seen[-1]
    )
    for made in (rule(), rule(probes=5)):
        ap.convert(nn.Linear(7, 3), made)(torch.ones(2, 7, requires_grad=True)).sum().backward()
    assert [tuple(p.shape) for p in seen] == [(32, 7), (5, 7)]


DRAW = {"init": "gaussian", "std": 0.02}
BROADCAST = {"calibrate_every": 0, "error": "logits", "features": None}
DEFAULTS = {
    ap.FeedbackAlignment: {**DRAW, "k": None},
    ap.SignSymmetry: {"scale": "frobenius", "variant": "sign"},
    ap.KolenPollack: {**DRAW, "k": None},
    ap.WeightMirror: {"probes": 32, "decay": 1.0, **DRAW},
    ap.AlignedFeedback: {"probes": 32, "normalize": False, **DRAW},
    ap.DirectFeedback: {
        "granularity": "matmul",
        **BROADCAST,
        "feedback": "shared",
        "pass_through": "hybrid",
        **DRAW,
        "k": None,
    },
    ap.BlockDirectFeedback: {"features": None, **DRAW, "k": None},
    ap.GrAPE: {"probes": 1, "every": 1, "normalize": "hidden", **BROADCAST, "std": 0.02},
}


@pytest.mark.parametrize("rule", DEFAULTS, ids=lambda r: r.__name__)
def test_defaults_are_those_of_the_papers_and_pages(rule: type) -> None:
    found = {name: p.default for name, p in inspect.signature(rule).parameters.items()}
    assert found == DEFAULTS[rule]


@pytest.mark.parametrize("rule", [*DRAWN, *PLAIN, ap.GrAPE])
@pytest.mark.parametrize("std", [0.0, -0.1, math.inf, math.nan])
def test_a_size_of_zero_or_none_at_all_is_refused(rule: type, std: float) -> None:
    with pytest.raises(ap.ConfigError, match="std must be a positive number"):
        rule(std=std)


@pytest.mark.parametrize("rule", DRAWN)
def test_a_row_without_entries_is_refused(rule: type) -> None:
    with pytest.raises(ap.ConfigError, match="must be >= 1, not 0"):
        rule(init="sparse", k=0)


@pytest.mark.parametrize("rule", [ap.DirectFeedback, ap.GrAPE])
@pytest.mark.parametrize("period", [1, -1])
def test_a_period_that_leaves_no_step_to_the_rule_is_refused(rule: type, period: int) -> None:
    with pytest.raises(ap.ConfigError, match="no step to the rule"):
        rule(calibrate_every=period)


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        (ap.WeightMirror, {"probes": 1}),
        (ap.WeightMirror, {"decay": -0.1}),
        (ap.WeightMirror, {"decay": math.inf}),
        (ap.AlignedFeedback, {"probes": 0}),
        (ap.BlockDirectFeedback, {"features": 0}),
        (ap.GrAPE, {"probes": 0}),
        (ap.GrAPE, {"every": 0}),
    ],
)
def test_values_out_of_range_are_refused(rule: type, wrong: dict[str, float]) -> None:
    with pytest.raises(ap.ConfigError, match=next(iter(wrong))):
        rule(**wrong)


def test_a_mirror_may_do_without_decay_and_hear_two_probes() -> None:
    assert ap.WeightMirror(decay=0.0, probes=2).decay == 0.0
