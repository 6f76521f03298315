"""The field's reference problem: one causal attention layer, relaxed, under a fixed random head.

Every figure of an audit is about this problem, so one seed draws all of it: the weights, the token
embedding, the head and the batch. Shapes: `B` windows, `T` tokens, `C` channels, `H` heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from altprop import (
    AEP,
    BPTT,
    EP,
    Anderson,
    Arm,
    ConfigError,
    DampedAttention,
    Equilibrium,
    Euler,
    Implicit,
    PublishedAEP,
    PublishedEP,
    Trial,
    finite_difference_errors,
    spectrum,
)
from altprop.lm.text import Batches, Corpus

Count = Callable[[], object]

RELAXATION = Euler(step=0.1, max_steps=120, tol=0.0)
REFERENCE = Arm(BPTT(), RELAXATION, name="BPTT, 120 Euler steps of 0.1")
DIRECTIONS = 4  # of finite differences
CHECKS = 1 + DIRECTIONS * 4 * 4  # losses of `check_reference`: four for each of four parameters
AT_REST = 1e-3  # the force residual up to which a state counts as a fixed point


@dataclass(frozen=True)
class Sizes:
    """The sizes of the reference problem: `B`, `T`, `C`, `H`, `s`, `c`, and the embedding's."""

    batch: int = 16
    context: int = 64
    d_model: int = 128
    heads: int = 4
    scale: float = 1.0
    damping: float = 1.0
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("batch", "context", "d_model", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")


class ReferenceProblem(nn.Module):
    """`model(x, y)` is the mean cross-entropy of the tokens `y` after `x`, both `(B, T)`.

    The token embedding, without positions, and the head, `N(0, 1/C)` and without bias or norm, are
    fixed; the four attention matrices are what a gradient is for. The cost goes to the
    `Equilibrium` too, for estimators that nudge with it. Draws from torch's global generator, what
    is fixed first: one seed gives one embedding and one head whatever the block is.

    Source: the setting of Scurria et al., arXiv 2602.03670, with the sizes of nanoGPT's smallest
    recipe.

    **Arguments:** `vocabulary`, how many tokens there are; `sizes`.
    """

    embedding: Tensor
    head: Tensor

    def __init__(self, vocabulary: int, sizes: Sizes) -> None:
        super().__init__()
        C = sizes.d_model
        self.register_buffer("embedding", sizes.embedding_std * torch.randn(vocabulary, C))
        self.register_buffer("head", C**-0.5 * torch.randn(vocabulary, C))
        self.block = Equilibrium(DampedAttention(C, sizes.heads, sizes.scale, sizes.damping))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        def cost(z: Tensor) -> Tensor:
            return nnf.cross_entropy(nnf.linear(z, self.head).flatten(0, 1), y.flatten())

        return cost(self.block(self.embedding[x], cost=cost))


def reference_trial(
    corpus: Corpus, sizes: Sizes, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[ReferenceProblem, Tensor, Tensor]:
    """Draw the problem of one seed: the model, and its tokens `x` and `y`, both `(B, T)`."""
    batches = Batches(corpus.train, sizes.batch, sizes.context, torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ReferenceProblem(len(corpus.tokenizer), sizes)
    return (model.to(dtype), *batches.draw())


def make_trial(corpus: Corpus, sizes: Sizes, seed: int, count: Count = lambda: None) -> Trial:
    """Return the problem of one seed as a trial of an audit; `count` is called for every loss."""
    model, x, y = reference_trial(corpus, sizes, seed)
    return Trial(model, _counted(partial(model, x, y), count), f"seed {seed}")


def _counted(loss: Callable[[], Tensor], count: Count) -> Callable[[], Tensor]:
    def counted() -> Tensor:
        count()
        return loss()

    return counted


def make_arms(phase_steps: int) -> list[Arm]:
    """Return the arms of the default audit.

    The published ones relax as published, the others solve with their defaults, except that a
    nudged phase of theirs may take `phase_steps` evaluations.
    """
    published = {
        "EP (published)": PublishedEP(),
        "AEP (published)": PublishedAEP(),
        "AEP (published, T2=40)": PublishedAEP(steps=40),
        "AEP (published, T2=80)": PublishedAEP(steps=80),
        "AEP (published, T2=160)": PublishedAEP(steps=160),
    }
    solved = {
        "EP": EP(max_steps=phase_steps),
        "AEP": AEP(max_steps=phase_steps),
        "Implicit": Implicit(max_steps=phase_steps),
    }
    return [
        *(Arm(estimator, RELAXATION, name) for name, estimator in published.items()),
        *(Arm(estimator, Anderson(), name) for name, estimator in solved.items()),
    ]


@dataclass(frozen=True)
class Rest:
    """Whether the reference's relaxation came to rest, and whether it would stay there.

    `force_residual`: the worst `‖F‖/‖z‖` of a window. `step_residual`: the worst `ε‖F‖/‖z‖`, which
    a small `ε` makes small whatever the force. `abscissa`: the largest real part of an eigenvalue
    of `∂F/∂z`.
    """

    force_residual: float
    step_residual: float
    abscissa: float

    @property
    def verdict(self) -> str:
        """The finding in a sentence."""
        steps = f"after {RELAXATION.max_steps} steps"
        if not self.force_residual <= AT_REST:
            return (
                f"no fixed point: {steps} the force is still {self.force_residual:.1e} of the "
                f"state, more than {AT_REST:g}"
            )
        stable = self.abscissa < 0
        return (
            f"{'stable' if stable else 'unstable'} fixed point: {steps} the force is "
            f"{self.force_residual:.1e} of the state, and the rightmost eigenvalue of its Jacobian "
            f"has real part {self.abscissa:+.2f}, so a small displacement "
            f"{'dies out' if stable else 'grows'}"
        )


def relax(trial: Trial) -> Rest:
    """Run the reference's free phase and say where it ended."""
    assert isinstance(trial.model, ReferenceProblem)
    with torch.no_grad(), REFERENCE.applied(trial.model):
        trial.loss()
    certificate = trial.model.block.certificate
    assert certificate is not None
    residual = float(certificate.free_residual.max())
    finite = bool(torch.isfinite(certificate.state).all())
    abscissa = float(spectrum(certificate, dimension=40).abscissa.max()) if finite else math.nan
    return Rest(residual, RELAXATION.step * residual, abscissa)


def check_reference(
    corpus: Corpus, sizes: Sizes, seed: int, count: Count = lambda: None
) -> dict[str, Any]:
    """Compare the reference itself with finite differences in float64, on a small instance.

    Its embedding is of unit scale: at 0.02 attention is so nearly uniform that the gradients of
    `W_Q` and `W_K` are 1e-7 of the loss, and drown in the rounding of its differences.
    """
    small = replace(sizes, batch=2, context=8, d_model=8 * sizes.heads, embedding_std=1.0)
    model, x, y = reference_trial(corpus, small, seed, torch.float64)
    loss = _counted(partial(model, x, y), count)
    errors = finite_difference_errors(loss, model, REFERENCE, directions=DIRECTIONS)
    return {
        "instance": asdict(small),
        "dtype": "float64",
        "relative_error": max(errors.values()),
        "parameters": errors,
    }
