"""A small network, and what is asked of the audits of its steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import altprop as ap
from altprop import Verdict

generator = torch.Generator().manual_seed(0)
BATCH = (
    torch.randn(64, 40, generator=generator),
    torch.randint(10, (64,), generator=generator),
)
HIDDEN, LAST = ("0.weight", "2.weight"), "4.weight"


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 10)
    )


def loss(m: nn.Module, batch: Any) -> Tensor:
    return nnf.cross_entropy(m(batch[0]), batch[1])


def backprop(m: nn.Module, batch: Any) -> None:
    loss(m, batch).backward()


def audited(step: Any, m: nn.Module | None = None) -> ap.StepAudit:
    return ap.audit_step(step, model() if m is None else m, loss, BATCH)


def verdicts(found: ap.StepAudit) -> list[Verdict]:
    return [found[name].verdict for name in (*HIDDEN, LAST)]
