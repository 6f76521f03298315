"""The estimators as published: the steps they make, what is wrong with them, and what mends it."""

from __future__ import annotations

import pytest
import torch

import altprop as ap
from systems import B, Case, N, cosine, flat, randn, reference_problem, size


@pytest.mark.parametrize("nudge", ["linear", "cost"])
@pytest.mark.parametrize("clip", [None, False, True])
def test_the_published_forms_make_the_published_steps(clip: bool | None, nudge: str) -> None:
    case = Case(scale=2.0)
    beta, steps, eps = 0.05, 7, 0.3
    options = {"step": eps, "steps": steps, "beta": beta, "nudge": nudge}
    if clip is None:
        run = case.run(ap.PublishedEP(**options))
    else:
        run = case.run(ap.PublishedAEP(**options, clip=clip))
    still, J = run.said.state, run.J
    # a linear nudge is the loss's cotangent; a cost's is the cost's own, and the loss is twice it
    factor = 1.0 if nudge == "linear" else 2.0
    ends, drives = [], []
    for sign in (1, -1):
        z = still
        for _ in range(steps):
            pull = run.g if nudge == "linear" else randn(B, N, seed=3) + z**2
            drive = case.force(z, run.x) - sign * beta * pull
            if clip is not None:
                d = z - still
                correction = torch.einsum("bij,bj->bi", J - J.transpose(1, 2), d)
                if clip and correction.norm() > drive.norm():
                    correction = correction * (drive.norm() / correction.norm())
                drive = drive - correction
            z = z + eps * drive
        ends.append(z)
        drives.append(drive)
    torch.testing.assert_close(
        run.a, factor * (ends[1] - ends[0]) / (2 * beta), rtol=1e-8, atol=1e-10
    )
    moved = torch.maximum(size(ends[0] - still), size(ends[1] - still)) / size(still)
    torch.testing.assert_close(run.said.response, moved, rtol=1e-8, atol=0)
    own = size(run.g) / factor
    last = torch.maximum(size(drives[0]), size(drives[1])) / (beta * own)
    torch.testing.assert_close(run.said.adjoint_residual, last, rtol=1e-6, atol=0)
    torch.testing.assert_close(run.said.beta, torch.full((B,), beta, dtype=torch.float64))
    torch.testing.assert_close(run.said.adjoint_remainder, (drives[1] - drives[0]) / 2)
    products = 1 if clip is None else 3
    assert run.said.adjoint_evaluations == 2 * steps * products + (clip is not None)


@pytest.mark.parametrize("nudge", ["cost", "linear"])
def test_clipping_makes_published_aep_worse_the_longer_its_phases(nudge: str) -> None:
    this = reference_problem(1, B=2, T=16, C=32)  # its free state is a stable fixed point
    this.solver = ap.Anderson(tol=1e-6, max_steps=200)

    def weights(estimator: ap.AbstractEstimator) -> torch.Tensor:
        return flat({k: g for k, g in this.gradients(estimator).items() if k != "x"})

    wanted = weights(ap.Implicit(tol=1e-6))

    def score(steps: int, clip: bool) -> float:
        # a linear nudge is in units of the mean loss's cotangent, as the cost nudge is
        return cosine(weights(ap.PublishedAEP(steps=steps, clip=clip, nudge=nudge)), wanted)

    clipped = [score(steps, clip=True) for steps in (20, 40, 80, 160)]
    assert clipped[0] > clipped[1] > clipped[2] > clipped[3]
    assert clipped[3] < 0.95
    free = [score(steps, clip=False) for steps in (20, 40, 80, 160)]
    assert free[0] < free[1] < 0.99999 < free[2] and free[3] > 0.99999
    # and published EP, which has no correction, is further off
    assert cosine(weights(ap.PublishedEP(nudge=nudge)), wanted) < 0.8 < 0.97 < clipped[0]
