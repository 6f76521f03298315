"""Generation beside an exact cache gives what the whole window gives, and draws as it is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import single, some_ids, stacked
from torch import nn

import altprop as ap
from altprop.lm.model import GPT, ModelConfig, generate, stream

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: single("gated"),
    "damped": lambda: single("damped"),
    "thick": lambda: single("thick"),
    "joint": lambda: stacked("joint").eval(),
    "separate": lambda: stacked("separate").eval(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_cached_tokens_are_those_of_the_whole_window_and_past_the_context_of_the_last(
    kind: str,
) -> None:
    model, ids = MODELS[kind](), torch.tensor([[1, 2], [3, 4]])
    out = generate(model, ids, 12, temperature=0)
    assert torch.equal(out[:, :2], ids) and len(out.unique()) > 4
    for t in range(2, 14):
        logits = model(out[:, max(0, t - 9) : t])[0][:, -1]
        assert torch.equal(logits.argmax(-1), out[:, t])


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_that_come_in_pieces_have_the_states_of_the_whole_window(kind: str) -> None:
    block, cache, pieces = MODELS[kind]().block, None, []
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = block(x)
        for part in x.split([3, 1, 1, 4], dim=1):
            z, cache = block.extend(part, cache)
            pieces.append(z)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
        # beside no cache it is the state of the module
        torch.testing.assert_close(block.extend(x)[0], whole, rtol=1e-10, atol=1e-11)


def test_hundreds_of_cached_tokens_are_those_of_the_full_solve() -> None:
    """One full solve of all tokens checks every prefix, for a state knows no later token."""
    model = single("gated", 401)
    out = generate(model, torch.tensor([[1]]), 400, temperature=0)
    with torch.no_grad():
        logits = model(out)[0]
    assert torch.equal(logits[:, :-1].argmax(-1), out[:, 1:])
    assert len(out.unique()) > 6


def test_a_stream_yields_what_generate_returns_with_a_generator_of_its_own() -> None:
    model, ids = single("damped"), torch.tensor([[1, 2]])

    def seeded(seed: int) -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(seed)}

    whole = generate(model, ids, 20, **seeded(5))
    parts = list(stream(model, ids, 20, **seeded(5)))
    assert [p.shape for p in parts] == [(1, 1)] * 20
    assert torch.equal(torch.cat([ids, *parts], 1), whole) and whole.dtype == torch.int64
    assert not torch.equal(generate(model, ids, 20, **seeded(6)), whole)


def test_top_k_draws_from_the_likeliest_k_and_a_higher_temperature_spreads_the_draws() -> None:
    model, ids = single("gated"), some_ids(B=1, T=7).expand(400, -1)

    def kinds(**how: Any) -> set[int]:
        seed = torch.Generator().manual_seed(0)
        return set(generate(model, ids, 1, generator=seed, **how)[:, -1].tolist())

    with torch.no_grad():
        likeliest = model(ids[:1])[0][0, -1].topk(3).indices.tolist()
    assert kinds(temperature=5.0, top_k=3) == set(likeliest) < kinds(temperature=5.0)
    assert kinds(top_k=1) == {likeliest[0]}
    spread = [len(kinds(temperature=heat)) for heat in (0.1, 1.0, 10.0)]
    assert spread == sorted(spread) and spread[0] < spread[-1]


def test_generation_refuses_what_it_cannot_do() -> None:
    model, ids = single("gated"), some_ids(B=1, T=3)
    assert torch.equal(generate(model, ids, 0), ids)
    for how, message in (
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(ap.ConfigError, match=message):
            generate(model, ids, 1, **how)
    with pytest.raises(ap.ConfigError, match="-2 tokens"):
        generate(model, ids, -2)
    with pytest.raises(ap.DataError, match="the prompt is empty"):
        generate(model, ids[:, :0], 1)
    nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(ap.ConvergenceError, match="logits are not finite"):
        generate(model, ids, 1)


@pytest.mark.parametrize("rule", [None, ap.SignSymmetry(), ap.DirectFeedback(granularity="block")])
def test_a_gpt_beside_its_keys_and_values_writes_what_the_whole_window_says(
    rule: ap.AbstractRule | None,
) -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(11, context=24, d_model=16, heads=2, layers=3)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # so that attention matters
    if rule is not None:
        ap.convert(model, rule, output="head")
    ids = torch.randint(11, (2, 5))
    logits, cache = model.extend(ids)
    torch.testing.assert_close(logits, model(ids)[0][:, -1].detach(), rtol=1e-12, atol=1e-12)
    new = torch.randint(11, (2, 3))
    logits, _ = model.extend(new, cache)
    whole = model(torch.cat([ids, new], 1))[0][:, -1]
    torch.testing.assert_close(logits, whole.detach(), rtol=1e-12, atol=1e-12)
    out = generate(model, ids, 30, temperature=0)  # past the context too
    for t in range(5, 35):
        window = out[:, max(0, t - 24) : t]
        assert torch.equal(model(window)[0][:, -1].argmax(-1), out[:, t])


def test_a_converted_model_generates_as_before() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(13, 8, 8, 2, layers=2)).eval()
    before = generate(model, torch.tensor([[1]]), 6, temperature=0)
    ap.convert(model, {"blocks": ap.AEP()})
    assert torch.equal(generate(model, torch.tensor([[1]]), 6, temperature=0), before)
