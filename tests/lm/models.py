"""Tiny language models with weights large enough that no token is like another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import altprop as ap
from altprop.lm.model import EquilibriumLM, ModelConfig
from systems import EXACT, TIGHT

STACKS = ["joint", "separate"]


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig(13, **{"context": 9, "d_model": 8, "heads": 2, "layers": 3, **changes})


def some_ids(B: int = 2, T: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(13, (B, T), generator=torch.Generator().manual_seed(seed))


def gates(model: nn.Module) -> list[nn.Parameter]:
    found = [getattr(block.dynamics, "gate", None) for _, block in ap.equilibria(model)]
    return [gate for gate in found if gate is not None]


def opened(model: EquilibriumLM, std: float = 0.2) -> EquilibriumLM:
    """Return the model in float64 with weights of some size and its gates open."""
    torch.manual_seed(0)
    rows = (13, model.positions.num_embeddings)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.0 if p.shape[0] in rows else std)
    for own in gates(model):
        nn.init.uniform_(own, -0.3, 0.3)
    return model.double()


def stacked(
    stacking: str, estimator: Any = EXACT, solver: Any = TIGHT, **how: Any
) -> EquilibriumLM:
    return opened(EquilibriumLM(shape(stacking=stacking, **how), solver, estimator))


def single(block: str, context: int = 9, tol: float = 1e-6) -> EquilibriumLM:
    std = 0.2 if block == "gated" else 0.1  # the others lose their fixed point beyond
    made = EquilibriumLM(shape(block=block, context=context, layers=1), ap.Anderson(tol=tol))
    return opened(made, std).eval()
