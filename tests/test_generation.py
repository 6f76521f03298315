"""Generation beside an exact cache gives what the whole window gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import altprop as ap
from altprop.lm.model import GPT, EquilibriumLM, ModelConfig, generate, stream


def tiny(block: str, context: int, tol: float = 1e-6) -> EquilibriumLM:
    """Return a float64 model with weights large enough that no token is like another."""
    torch.manual_seed(0)
    scale = 0.2 if block == "gated" else 0.1  # the others lose their fixed point beyond
    model = EquilibriumLM(ModelConfig(13, context, 8, 2, block=block), ap.Anderson(tol=tol))
    for p in model.parameters():
        nn.init.normal_(p, std=1.0 if p.shape[0] in (13, context) else scale)
    if block == "gated":
        nn.init.uniform_(model.block.dynamics.alpha, -0.4, 0.4)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.ones_(norm.weight)
    return model.double().eval()


@pytest.mark.parametrize("block", ["gated", "damped", "thick"])
def test_cached_tokens_are_those_of_the_whole_window(block: str) -> None:
    model, ids = tiny(block, 12), torch.tensor([[1, 2], [3, 4]])
    out = generate(model, ids, 10, temperature=0)
    assert len(out.unique()) > 4
    for t in range(2, 12):
        logits = model(out[:, :t])[0][:, -1]
        assert torch.equal(logits.argmax(-1), out[:, t])


@pytest.mark.parametrize("block", ["gated", "damped", "thick"])
def test_a_whole_window_beside_no_cache_is_the_state_of_the_module(block: str) -> None:
    model = tiny(block, 5, tol=1e-2)  # a short window, which is not solved in parts
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model.block.extend(x)[0], model.block(x), rtol=1e-12, atol=1e-14)


def test_a_thousand_cached_tokens_are_those_of_the_full_solve() -> None:
    """One full solve of all tokens checks every prefix, for a state knows no later token."""
    model = tiny("gated", 1001)
    out = generate(model, torch.tensor([[1]]), 1000, temperature=0)
    with torch.no_grad():
        logits = model(out)[0]
    assert torch.equal(logits[:, :-1].argmax(-1), out[:, 1:])
    assert len(out.unique()) > 6


def test_past_the_context_the_window_is_solved_anew() -> None:
    model, ids = tiny("gated", 6), torch.tensor([[1, 2, 3]])
    out = generate(model, ids, 8, temperature=0)
    for t in range(3, 11):
        logits = model(out[:, max(0, t - 6) : t])[0][:, -1]
        assert torch.equal(logits.argmax(-1), out[:, t])


def test_a_stream_yields_what_generate_returns() -> None:
    model, ids = tiny("damped", 9), torch.tensor([[1, 2]])
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    whole = generate(model, ids, 5, generator=draws[0])
    parts = list(stream(model, ids, 5, generator=draws[1]))
    assert [p.shape for p in parts] == [(1, 1)] * 5
    assert torch.equal(torch.cat([ids, *parts], 1), whole)


def test_a_converted_model_generates_as_before() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(13, 8, 8, 2, layers=2)).eval()
    before = generate(model, torch.tensor([[1]]), 6, temperature=0)
    ap.convert(model, {"blocks": ap.AEP()})
    assert torch.equal(generate(model, torch.tensor([[1]]), 6, temperature=0), before)
