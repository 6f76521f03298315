"""A penalty on the residual stream: what direct feedback gains where each block keeps its size.

The norm before the head hides the stream's length from the loss, so that nothing in a broadcast
error holds it: blocks write ever larger numbers, beside which what the others write is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from altprop import DirectFeedback, rules_off
from altprop.lab.compare.arms import Arm
from altprop.lab.reproduce.figure import Figure
from altprop.lab.reproduce.learning import score_of
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, Loss
from altprop.lab.tasks.fashion import Fashion
from altprop.lab.tasks.task import AbstractTask
from altprop.lab.tasks.text import Text

WIDTH, DEPTH, EPOCHS = 256, 4, 10
RULE = DirectFeedback("block", feedback="independent")
# an arm, and whether its blocks are held
ARMS = {
    "backprop": (Arm("backprop"), False),
    "backprop, penalty": (Arm("backprop"), True),
    "direct feedback": (Arm("direct feedback", RULE), False),
    "direct feedback, penalty": (Arm("direct feedback", RULE), True),
    "frozen blocks": (Arm("frozen", frozen=True), False),
}
# of the mean square of a block's output, the best of powers of ten on held-out data of one seed
STRENGTHS = {"images": 0.01, "text": 1.0}
PUBLISHED = {
    "backprop": 58.5,
    "backprop, penalty": 53.2,
    "direct feedback": 30.1,
    "direct feedback, penalty": 36.0,
    "frozen blocks": 34.9,
}


class Residual(nn.Module):
    """`h + W₂ GELU(W₁ LN(h))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(h))))


class ResidualMLP(nn.Module):
    """Residual blocks between a linear map and a normed head."""

    def __init__(self, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


@dataclass(frozen=True)
class Images(Fashion):
    """Fashion-MNIST by a residual network."""

    name: ClassVar[str] = "images"

    @property
    def recipe(self) -> TrainConfig:
        return TrainConfig(
            steps=EPOCHS * 430, batch=128, lr=1e-3, warmup=0, final_lr=0.0, weight_decay=0.01,
            beta2=0.999, clip=1e30, stabiliser=None, device="cpu",
        )  # fmt: skip

    def network(self) -> nn.Module:
        return ResidualMLP(784, WIDTH, DEPTH, 10)


@contextmanager
def _inputs(blocks: nn.ModuleList) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what each block was given last, after a rule's probes, without its history."""
    seen: dict[nn.Module, Tensor] = {}

    def note(block: nn.Module, given: tuple[Any, ...]) -> None:
        seen[block] = given[0].detach()

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def held(task: AbstractTask, strength: float, converted: bool) -> Loss:
    """Return a task's loss, and beside it the mean squares of what the blocks put out.

    Each block feels its own alone, as exactly as one block's gradient is known to it.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        blocks: Any = model.blocks
        with _inputs(blocks) as seen:
            value = task.loss(model, batch)
        with rules_off(model) if converted else nullcontext():
            outputs = [block(seen[block]) for block in blocks]
        return value + strength * sum((h.square().mean() for h in outputs), value.new_zeros(()))

    return loss


def measure(seed: int) -> Mapping[str, float]:
    """Return what every arm reaches on images and on text."""
    tasks: dict[str, AbstractTask] = {"images": Images(), "text": Text()}
    return {
        f"{name}, {line}": score_of(
            arm,
            task,
            seed,
            held(task, STRENGTHS[name], arm.rule is not None) if penalty else task.loss,
        )
        for name, task in tasks.items()
        for line, (arm, penalty) in ARMS.items()
    }


FIGURE = Figure(
    title="A penalty on the residual stream",
    source="Drafts of a paper on the evaluation of feedback alignment (2026), CIFAR-10, 30 epochs, "
    "three seeds",
    setting=f"Images: Fashion-MNIST by {DEPTH} pre-norm residual blocks of width {WIDTH}, "
    f"{EPOCHS} epochs of AdamW from 1e-3 by a cosine, batch 128, accuracy in %. Text: the GPT of "
    "`altprop train` and its recipe, 1 000 steps on the plays, cross-entropy in nats. The penalty "
    f"is {STRENGTHS['images']:g} (images) and {STRENGTHS['text']:g} (text) of the mean square of "
    "each block's output, which that block alone feels",
    unit="% or nats",
    published={f"images, {line}": value for line, value in PUBLISHED.items()}
    | {f"text, {line}": None for line in ARMS},
    measure=measure,
    differs="CIFAR-10 is not at hand, so that the effects are to be compared, not the figures; the "
    "published network and the strength of its penalty are not known here",
)
