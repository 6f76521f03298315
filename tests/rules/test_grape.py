"""What GrAPE means, written from the paper and compared on widths that all differ.

Its estimate is compared with the exact Jacobian along its own probes.
Shapes: N samples, T tokens; a feedback `B` is (features, k), an error `e` is (N, T, k).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from uneven import (
    Exact,
    N,
    Stack,
    T,
    Uneven,
    close,
    inputs,
    outer,
    trained,
)

import altprop as ap


@pytest.fixture
def tangents(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """The tap and the tangent of every probe that GrAPE makes in the test, in order."""
    found: list[tuple[int, Tensor]] = []
    plain = ap.GrAPE.estimates

    class Heard:
        def __init__(self, probe: Any) -> None:
            self.probe, self.taps, self.average = probe, probe.taps, probe.average

        def push(self, tap: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            p, Jp = self.probe.push(tap, generator)
            found.append((tap, p))
            return p, Jp

    monkeypatch.setattr(
        ap.GrAPE, "estimates", lambda self, probe, *rest: plain(self, Heard(probe), *rest)
    )
    return found


def tail(model: Uneven, tap: int, error: str, h: Tensor) -> Tensor:
    """What is above a tap, in evaluation mode, written out."""
    if tap == 0:
        if model.mixed:
            h = torch.stack([h[:, : t + 1].sum(1) for t in range(T)], 1)
        h = torch.tanh(h @ model.blocks[1][0].weight.T + model.blocks[1][0].bias)
    return h if error == "head_input" else h @ model.head.weight.T + model.head.bias


NORMS = ["hidden", "output", "none"]


@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("error", ["logits", "head_input"])
def test_grape_descends_one_minus_the_cosine_to_the_jacobian_along_its_probes(
    error: str, normalize: str, tangents: list[tuple[int, Tensor]]
) -> None:
    probes = 3
    model = Uneven(mixed=True, dropout=0.5)
    rule = ap.GrAPE(probes=probes, normalize=normalize, error=error, std=0.3)
    ap.convert(model, rule, output="head")
    assert model.training
    for _ in range(2):
        tangents.clear()
        trained(model)
        assert [tap for tap, _ in tangents] == [0] * probes + [1] * probes
        with torch.no_grad():
            states = [model.blocks[0](inputs()[0].detach())]
            mixed = torch.stack([states[0][:, : t + 1].sum(1) for t in range(T)], 1)
            states.append(torch.tanh(model.blocks[1][0](mixed)))
        for tap, block in enumerate(model.blocks):
            estimate = torch.zeros_like(block.B_dfa)
            for _, p in (found for found in tangents if found[0] == tap):
                assert p.shape == states[tap].shape
                _, Jp = torch.autograd.functional.jvp(
                    lambda h, tap=tap: tail(model, tap, error, h), states[tap], p
                )
                for n in range(N):  # of each sample and token its own tangent and response
                    for t in range(T):
                        estimate += torch.outer(p[n, t], Jp[n, t]) / (probes * N * T)
            B = block.B_dfa.detach().clone().requires_grad_()
            norm = {"hidden": 1, "output": 0}.get(normalize, 1)
            vectors = zip(B.unbind(1 - norm), estimate.unbind(1 - norm), strict=True)
            torch.stack([1 - b @ j / (b.norm() * j.norm()) for b, j in vectors]).sum().backward()
            assert B.grad is not None
            close(block.B_dfa.grad, B.grad, 1e-9)


@pytest.mark.parametrize("normalize", NORMS)
def test_grape_sends_the_error_through_vectors_of_the_stated_norm(normalize: str) -> None:
    model = Uneven()
    exact = Exact(model)
    ap.convert(model, ap.GrAPE(normalize=normalize, std=0.3), output="head")
    trained(model)
    for i, block in enumerate(model.blocks):
        B = block.B_dfa.detach().clone()
        features, k = B.shape
        for f in range(features if normalize == "hidden" else 0):  # as N(0, std²) has on average
            B[f] *= 0.3 * math.sqrt(k) / B[f].norm()
        for o in range(k if normalize == "output" else 0):
            B[:, o] *= 0.3 * math.sqrt(features) / B[:, o].norm()
        signal = (exact.e @ B.T) * (1 - exact.h[i + 1] ** 2)
        close(block[0].weight.grad, outer(signal, exact.h[i]))


def test_grapes_tangents_are_standard_normal_and_new_for_every_probe_tap_and_step(
    tangents: list[tuple[int, Tensor]],
) -> None:
    model = ap.convert(Uneven(), ap.GrAPE(probes=2), output="head")
    for _ in range(40):
        trained(model)
    drawn = [p.flatten()[:36] for _, p in tangents]
    assert len(drawn) == 40 * 2 * 2
    for i, p in enumerate(drawn):
        assert all(not torch.equal(p, other) for other in drawn[:i])
    every = torch.stack(drawn)
    assert float(every.mean()) == pytest.approx(0, abs=0.05)
    assert float(every.std()) == pytest.approx(1, abs=0.05)
    # another seed has other tangents, the same one the same
    again = []
    for seed in (0, 1):
        tangents.clear()
        trained(ap.convert(Uneven(), ap.GrAPE(probes=2), output="head", seed=seed))
        again.append(tangents[0][1].flatten()[:36])
    assert torch.equal(again[0], drawn[0]) and not torch.equal(again[1], drawn[0])


def test_blocks_of_one_shape_hear_tangents_of_their_own(
    tangents: list[tuple[int, Tensor]],
) -> None:
    trained(ap.convert(Stack(), ap.GrAPE(), output="head"))
    (_, first), (_, second) = tangents
    assert first.shape == second.shape and not torch.equal(first, second)


def test_grape_measures_at_every_nth_pass_only_and_never_on_a_calibration(
    tangents: list[tuple[int, Tensor]],
) -> None:
    model = ap.convert(Uneven(), ap.GrAPE(every=2, calibrate_every=3), output="head")
    measured, moved = [], []
    for _ in range(6):
        tangents.clear()
        trained(model)
        measured.append(len(tangents))
        moved.append(all(bool(p.grad.any()) for p in ap.feedback_parameters(model)))
    # passes 2 and 5 are exact; of the others those with an even number measure
    assert measured == [2, 0, 0, 0, 2, 0]
    assert moved == [True, False, False, False, True, False]


def test_what_a_pass_draws_is_not_what_its_probes_have_drawn() -> None:
    class Sampled(Uneven):
        """Draws in evaluation mode too."""

        def above(self, h: Tensor) -> Tensor:
            return super().above(h + torch.randn_like(h))

    model = Sampled()
    x, _ = inputs()
    torch.manual_seed(5)
    plain = model(x)
    ap.convert(model, ap.GrAPE(probes=2), output="head")
    torch.manual_seed(5)
    assert torch.equal(model(x), plain)


def test_a_running_statistic_is_neither_used_nor_moved_by_the_probes_batch() -> None:
    class Normed(Uneven):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(7, dtype=torch.float64)

        def above(self, h: Tensor) -> Tensor:
            return super().above(self.norm(h.flatten(0, 1)).unflatten(0, (N, T)))

    with_probes, without = (
        ap.convert(Normed(), rule, output="head", seed=0)
        for rule in (ap.GrAPE(probes=3), ap.DirectFeedback("block", feedback="independent"))
    )
    without.load_state_dict(with_probes.state_dict(), strict=False)
    for model in (with_probes, without):
        trained(model)
    close(with_probes.norm.running_mean, without.norm.running_mean)
    assert with_probes.norm.num_batches_tracked == 1
