"""One step of a long training held still: how far its gradient is from the exact one.

    python benchmarks/hard_step.py --data tinyshakespeare.txt --seed 0 --step 2816

The default run of `altprop train` (14 000 steps at 1.5e-3) is made up to the step before. The
step's gradient, by the estimator at the state of the free phase, is then compared with the exact
one at the exact state, as a whole and window by window: `Implicit` by GMRES to 1e-5 at a state that
is solved to 1e-6. Which steps are hard depends on the processor, for a rounding leads to another
run: `state_error` and `gradient_norm` in a run's metrics show them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import altprop as ap
from altprop.lab.settings import TrainConfig
from altprop.lab.train import begin, predicted, steps
from altprop.lm.text import load_corpus
from common import markdown, write

EXACT = ap.Implicit(tol=1e-5, solver=ap.GMRES(max_steps=300))
SETTLED = ap.Fallback((ap.FixedPoint(max_steps=200), ap.NewtonKrylov(max_steps=2000)), tol=1e-6)


def gradient(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, ap.Certificate]:
    """Return the gradient of a batch as one vector, and what its equilibrium measured."""
    model.zero_grad()
    predicted(model, batch).backward()
    ((_, block),) = ap.equilibria(model)
    assert block.certificate is not None
    held = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(held), block.certificate


def compared(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, float]:
    """Return how the gradient of a batch stands beside the exact one, and its certificate."""
    ((_, block),) = ap.equilibria(model)
    own = block.solver, block.estimator
    found, seen = gradient(model, batch)
    block.solver, block.estimator = SETTLED, EXACT
    exact, settled = gradient(model, batch)
    block.solver, block.estimator = own
    assert seen.state_error is not None
    away = (seen.state - settled.state).flatten(1).norm(dim=1) / seen.state.flatten(1).norm(dim=1)
    return {
        "norm": float(found.norm()),
        "exact norm": float(exact.norm()),
        "cosine": float(cosine_similarity(found, exact, 0)),
        "free residual": float(seen.free_residual.max()),
        "state error": float(seen.state_error.max()),
        "distance of the state": float(away.max()),
        "evaluations": float(seen.adjoint_evaluations),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="plays", help="a corpus or a text file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=2816)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = TrainConfig(data=given.data, steps=14_000, lr=1.5e-3, seed=given.seed, device="cpu")
    state, guard = begin(config, load_corpus(given.data))
    run = steps(config, state, guard)
    for _ in range(given.step - 1):
        next(run)
    batch = state.batches.draw()
    model = state.model.train()
    rows: dict[str, dict[str, float]] = {"the batch": compared(model, batch)}
    for index in range(len(batch[0])):
        one: Any = tuple(part[index : index + 1] for part in batch)
        rows[f"window {index}"] = compared(model, one)
    names = list(rows["the batch"])
    table = [[what, *(f"{row[name]:.3g}" for name in names)] for what, row in rows.items()]
    said = (
        f"Step {given.step} of the default run, seed {given.seed}; the worst of a batch's windows."
    )
    write("hard_step", "A hard step", [said, markdown(["what", *names], table)], rows)


if __name__ == "__main__":
    main()
