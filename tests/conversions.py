"""A tiny model for conversion tests, what a pass writes into it, and how two are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altprop.testing.rules import TinyModel

TOKENS = torch.arange(12).view(4, 3) % 7


def tiny() -> TinyModel:
    """Return a language model in miniature, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyModel(tied=False).double()


def mlp() -> nn.Sequential:
    """Return a chain of two linear maps, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Return what one backward pass writes, by name, and leave nothing of it."""
    model.zero_grad()
    out = model(*inputs)
    (out[0] if isinstance(out, tuple) else out).tanh().square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tol: float = 1e-12) -> None:
    """Assert that the same parameters have the same gradients, to `tol` of the largest entry."""
    assert got.keys() == want.keys()
    for name, g in want.items():
        assert torch.allclose(got[name], g, rtol=0, atol=tol * max(1.0, float(g.abs().max()))), name


def assert_same_model(got: nn.Module, want: nn.Module) -> None:
    """Assert equal types, attributes and state: nothing of an earlier conversion is left."""
    for (path, a), (_, b) in zip(got.named_modules(), want.named_modules(), strict=True):
        assert type(a) is type(b), path
        assert a.__dict__.keys() == b.__dict__.keys(), path
    old, new = got.state_dict(), want.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in new)
