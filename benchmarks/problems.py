"""What the benchmark of gradients differentiates: a block, its input and a fixed loss head.

Three problems: the field's reference problem, and the gated block of two language models after a
short training, for at its initialisation its gate is shut and the equilibrium trivial. The weights
are kept below `runs/`, so that a second benchmark trains nothing.

Shapes: `B` windows, `T` tokens, `C` channels, `H` heads, `V` words of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import altprop as ap
from altprop.lab import checkpoint
from altprop.lab.reference import Sizes, reference_trial
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from altprop.lm.model import EquilibriumLM, embed
from altprop.lm.text import Corpus, load_corpus, windows

CACHE = Path("runs/benchmark")
HEADS = 4
Gradients = dict[str, Tensor]


class Head(nn.Module):
    """The mean cross-entropy of fixed tokens `(B, T)`, read from a state `(B, T, C)`."""

    def __init__(self, weight: Tensor, targets: Tensor, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("targets", targets)
        self.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        return nnf.cross_entropy(nnf.linear(self.norm(z), self.weight).flatten(0, 1), self.targets)


class OrdinaryBlock(nn.Module):
    """The unit: one feed-forward block as any GPT has it, `(B, T, C) → (B, T, C)`.

    It is written with torch alone, so that it does not change with the library. Without
    `feed_forward` it is `x + attention(x)`, which is what one Euler step of the reference does.
    """

    def __init__(self, d_model: int, heads: int, feed_forward: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.norm1 = nn.LayerNorm(d_model) if feed_forward else nn.Identity()
        self.rest = nn.Sequential()
        if feed_forward:
            up, down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
            self.rest = nn.Sequential(nn.LayerNorm(d_model), up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        u = x + self.out(mixed.transpose(1, 2).flatten(2))
        return u + self.rest(u) if len(self.rest) else u


@dataclass(frozen=True)
class Problem:
    """A dynamics with a fixed input `x`, `(B, T, C)`, and a fixed cost of its equilibrium."""

    name: str
    dynamics: ap.AbstractDynamics
    x: Tensor
    cost: nn.Module

    def block(
        self,
        estimator: ap.AbstractEstimator,
        solver: ap.AbstractSolver | None = None,
    ) -> ap.Equilibrium:
        """Return the equilibrium; what misses its tolerance is measured just the same."""
        return ap.Equilibrium(self.dynamics, solver, estimator, "accept")

    def differentiate(self, forward: Callable[[Tensor], Tensor], module: nn.Module) -> Gradients:
        """Run `x ↦ z` and the cost forward and backward: what every arm is timed on.

        Returns the gradients of the parameters of `module` and of `x`, by name.
        """
        module.zero_grad(set_to_none=True)
        x = self.x.detach().requires_grad_()
        self.cost(forward(x)).backward()
        named = {"x": x, **dict(module.named_parameters())}
        return {name: p.grad for name, p in named.items() if p.grad is not None}

    def exact(self) -> Gradients:
        """Return the exact gradients: the adjoint equation in float64, both solves to 1e-9."""
        whole = replace(
            self,
            dynamics=copy.deepcopy(self.dynamics).double(),
            x=self.x.double(),
            cost=copy.deepcopy(self.cost).double(),
        )
        tight = ap.Anderson(tol=1e-9, max_steps=1000)
        block = ap.Equilibrium(whole.dynamics, tight, ap.Implicit(tol=1e-9, max_steps=1000))
        return whole.differentiate(block, whole.dynamics)

    def ordinary(self) -> OrdinaryBlock:
        """Return the ordinary block of the same size."""
        has_feed_forward = not isinstance(self.dynamics, ap.DampedAttention)
        heads = self.dynamics.attention.heads  # type: ignore[union-attr]
        return OrdinaryBlock(self.x.shape[-1], heads, has_feed_forward).to(self.x)


def reference(data: str, device: torch.device, sizes: Sizes | None = None) -> Problem:
    """Return the reference problem."""
    sizes = sizes or Sizes()
    model, ids, targets = reference_trial(load_corpus(data), sizes, seed=0)
    name = (
        f"reference: damped attention, B = {sizes.batch}, T = {sizes.context}, "
        f"C = {sizes.d_model}, H = {sizes.heads}"
    )
    head = Head(model.head, targets.flatten()).to(device)
    x = model.embedding[ids].to(device)
    return Problem(name, model.block.dynamics.to(device), x, head)


def gated(data: str, device: torch.device, d_model: int, context: int, steps: int) -> Problem:
    """Return the gated block of a language model after `steps` steps, on 16 held-out windows."""
    corpus = load_corpus(data)
    model = trained(data, corpus, d_model, context, steps)
    ids, targets = windows(corpus.validation, 16, context, seed=1)
    with torch.no_grad():
        x = embed(model, ids)
    head = Head(model.head.weight, targets.flatten(), model.norm).to(device)
    name = f"gated block after {steps} steps, B = 16, T = {context}, C = {d_model}, H = {HEADS}"
    return Problem(name, model.block.dynamics.to(device), x.to(device), head)


def trained(data: str, corpus: Corpus, d_model: int, context: int, steps: int) -> EquilibriumLM:
    """Train a small language model by the library's own loop, or take it from an earlier run."""
    folder = CACHE / f"{Path(data).stem}-C{d_model}-T{context}-{steps}"
    config = TrainConfig(
        data=data, out=folder, d_model=d_model, heads=HEADS, context=context, batch=4, steps=steps,
        warmup=steps // 6, eval_every=steps, eval_windows=16, final_windows=16, sample=0,
        device="cpu", overwrite=True,
    )  # fmt: skip
    path = folder / "last.safetensors"
    if not path.exists() or checkpoint.load(path).notes["progress"]["step"] != steps:
        train(config)
    model = EquilibriumLM(config.shape(len(corpus.tokenizer)), on_failure="accept")
    checkpoint.restore_model(model, checkpoint.load(path), path)
    return model
