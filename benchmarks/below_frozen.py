"""Why direct feedback trains a GPT's blocks to less than they give when nobody trains them.

    python benchmarks/below_frozen.py --data tinyshakespeare.txt

Every arm trains the 4-block GPT of `Text(layers=4)` from one initialisation on the same batches, at
one rate, and changes one thing: what the blocks are told, how fast they learn, what holds their
output, which of them learn. Beside the loss stand the mean square of what leaves the last block,
and how the blocks' gradients lie to the exact ones. Arms that are in the results are not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import altprop as ap
from altprop.lab.building import freeze
from altprop.lab.compare.arms import Arm, CalibrationAlone, Rule
from altprop.lab.reproduce.residual_penalty import held
from altprop.lab.tasks import Text
from altprop.lab.train import begin_with, steps
from common import markdown, results, write

NAME = "below_frozen"
NEVER = 1_000_000_000
DIRECT = ap.DirectFeedback("block")
APART = ap.DirectFeedback("block", feedback="independent")


@dataclass(frozen=True)
class Trial:
    """`factor`, of the blocks' rate; `penalty`, on their outputs; `noise`, instead of gradients."""

    rule: Rule | None = None
    freeze: tuple[str, ...] = ()
    factor: float = 1.0
    penalty: float = 0.0
    noise: bool = False


def only(block: int) -> tuple[str, ...]:
    """Return the patterns of every block but one."""
    return tuple(f"blocks.{i}.*" for i in range(4) if i != block)


TRIALS = {
    "backprop": Trial(),
    "frozen blocks": Trial(freeze=("blocks.*",)),
    "noise instead of gradients": Trial(noise=True),
    "direct feedback": Trial(DIRECT),
    "direct feedback, rate × 0.1": Trial(DIRECT, factor=0.1),
    "direct feedback, penalty 0.01": Trial(DIRECT, penalty=0.01),
    "direct feedback, penalty 0.1": Trial(DIRECT, penalty=0.1),
    "direct feedback, penalty 1": Trial(DIRECT, penalty=1.0),
    "direct feedback, penalty 10": Trial(DIRECT, penalty=10.0),
    "penalty 1 alone": Trial(CalibrationAlone(replace(DIRECT, calibrate_every=NEVER)), penalty=1.0),
    "GrAPE": Trial(ap.GrAPE()),
    "GrAPE, penalty 1": Trial(ap.GrAPE(), penalty=1.0),
    "independent matrices": Trial(APART),
    "independent matrices, penalty 1": Trial(APART, penalty=1.0),
    "calibrated every 20": Trial(replace(DIRECT, calibrate_every=20)),
    "calibration alone, every 20": Trial(CalibrationAlone(replace(DIRECT, calibrate_every=20))),
    "calibrated every 20, penalty 1": Trial(replace(DIRECT, calibrate_every=20), penalty=1.0),
    "std 0.3": Trial(replace(DIRECT, std=0.3)),
    "block 0 alone, direct feedback": Trial(DIRECT, freeze=only(0)),
    "block 3 alone, direct feedback": Trial(DIRECT, freeze=only(3)),
    "block 0 alone, backprop": Trial(freeze=only(0)),
    "block 3 alone, backprop": Trial(freeze=only(3)),
}


def learning(model: nn.Module) -> list[nn.Parameter]:
    """Return the blocks' weights that learn, without their feedback."""
    blocks: Any = model.blocks
    feedback = {id(p) for p in ap.feedback_parameters(model)}
    return [p for p in blocks.parameters() if p.requires_grad and id(p) not in feedback]


@contextmanager
def treated(
    optimiser: torch.optim.Optimizer, blocks: list[nn.Parameter], trial: Trial
) -> Iterator[None]:
    """Let the blocks' weights make only a part of each step, or one of noise."""
    before: list[Tensor] = []

    def prepare(*_: Any) -> None:
        before[:] = [p.detach().clone() for p in blocks]
        for p in blocks if trial.noise else ():
            assert p.grad is not None
            p.grad.normal_()

    @torch.no_grad()
    def hold(*_: Any) -> None:
        for p, old in zip(blocks, before, strict=True):
            p.copy_(old.lerp(p, trial.factor))

    hooks = [optimiser.register_step_pre_hook(prepare), optimiser.register_step_post_hook(hold)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stream(model: nn.Module, ids: Tensor) -> float:
    """Return the mean square of what leaves the last block."""
    seen: list[Tensor] = []
    blocks: Any = model.blocks
    handle = blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return float(seen[0].square().mean())


def alignment(
    model: nn.Module, task: Text, batch: tuple[Tensor, ...], converted: bool
) -> list[float]:
    """Return the cosine of each block's gradient with the exact one."""
    blocks: Any = model.blocks
    parts = [[p for p in learning(model) if any(p is q for q in b.parameters())] for b in blocks]

    def gradients() -> list[Tensor]:
        loss = task.loss(model, batch)
        found = torch.autograd.grad(loss, learning(model), materialize_grads=True)
        at = {id(p): g for p, g in zip(learning(model), found, strict=True)}
        return [torch.cat([at[id(p)].flatten() for p in part]) for part in parts if part]

    own = gradients()
    if not converted:
        return [1.0] * len(own)
    with ap.rules_off(model):
        exact = gradients()
    return [float(torch.cosine_similarity(a, b, 0)) for a, b in zip(own, exact, strict=True)]


def run(trial: Trial, data: str, length: int, seed: int) -> dict[str, Any]:
    """Return what an arm reaches on the first half of what is held out."""
    task = Text(data=data, layers=4)
    recipe = replace(task.recipe, steps=length, seed=seed, warmup=min(100, length // 4))
    model = task.model(seed)
    Arm("", trial.rule).apply(task, model, seed)
    freeze(model, trial.freeze)
    converted = trial.rule is not None
    loss = held(task, trial.penalty, converted) if trial.penalty else task.loss
    state, guard = begin_with(recipe, model, loss, task.batches(seed))
    with treated(state.optimiser, learning(model), trial):
        for _ in steps(recipe, state, guard):
            pass
    probe = task.batches(seed + 1).draw()
    cosines = alignment(model, task, probe, converted) if learning(model) else []
    return {
        "loss": task.score(model, "validation"),
        "stream": stream(model, probe[0]),
        "cosines": [] if trial.noise else cosines,
    }


def main() -> None:
    """Run the arms that are not known yet, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="plays")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = {row["arm"]: row for row in results(NAME)}
    for arm, trial in TRIALS.items():
        if arm not in known:
            known[arm] = {"arm": arm, **run(trial, options.data, options.steps, options.seed)}
            report([known[arm] for arm in TRIALS if arm in known], options.steps)


def report(rows: list[dict[str, Any]], length: int) -> None:
    """Write the table."""
    losses = {row["arm"]: row["loss"] for row in rows}
    low, high = losses["backprop"], losses.get("frozen blocks", float("nan"))
    cells = [
        [
            row["arm"],
            f"{row['loss']:.3f}",
            f"{(high - row['loss']) / (high - low):.0%}",
            f"{row['stream']:.2g}",
            " ".join(f"{c:.2f}" for c in row["cosines"]) or "–",
        ]
        for row in rows
    ]
    head = [
        "arm",
        "cross-entropy",
        "recovery",
        "stream",
        "cosines",
    ]
    what = (
        f"A 4-block GPT (C = 128, T = 64, batch 16) after {length} steps at 3e-3, one seed. "
        "Cross-entropy in nats on the first half of what is held out; recovery is (frozen − arm) / "
        "(frozen − backprop); stream is the mean square of what leaves the last block; cosines are "
        "of the blocks' gradients with the exact ones, from the first block on."
    )
    write(NAME, "Direct feedback below frozen blocks", [what, markdown(head, cells)], rows)


if __name__ == "__main__":
    main()
