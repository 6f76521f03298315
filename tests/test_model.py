"""A model reads one and the same equilibrium in training, evaluation and generation."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import altprop as ap
from altprop import (
    AEP,
    Anderson,
    ConfigError,
    ConvergenceError,
    DataError,
    FixedPoint,
    Result,
    equilibria,
    using,
)
from altprop.lab.evaluation import evaluate
from altprop.lab.sample_command import load_run
from altprop.lab.train import train
from altprop.lm.model import GPT, EquilibriumLM, ModelConfig, cross_entropy, generate
from altprop.lm.text import load_corpus, windows
from lm_runs import small

SHAPE = ModelConfig(vocabulary=21, context=16, d_model=16, heads=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned something, its feedback included."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("altprop.lab.train.plot_run", lambda folder: folder)
        train(small(folder, steps=150, eval_every=150, lr=1e-2))
    return folder


@pytest.fixture
def model(run: Path) -> EquilibriumLM:
    model, _ = load_run(run, "last", "cpu")
    assert isinstance(model, EquilibriumLM)
    assert float(model.block.dynamics.alpha.detach().abs().max()) > 0.02  # the feedback is in use
    return model


def fresh(block: str = "gated", **changes: object) -> EquilibriumLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EquilibriumLM(replace(SHAPE, block=block), **changes)  # type: ignore[arg-type]


def some_ids(B: int = 4, T: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(21, (B, T), generator=torch.Generator().manual_seed(seed))


def state_of(model: EquilibriumLM) -> Tensor:
    assert model.block.certificate is not None
    return model.block.certificate.state


# One definition of the state


def test_training_and_evaluation_read_the_same_state_bit_for_bit(model: EquilibriumLM) -> None:
    ids = some_ids()
    trained, loss = model.train()(ids, ids)
    assert loss is not None and loss.requires_grad
    trained_state = state_of(model)
    with torch.no_grad():
        evaluated, evaluated_loss = model.eval()(ids, ids)
    assert evaluated_loss is not None
    assert torch.equal(trained_state, state_of(model))
    assert torch.equal(trained, evaluated) and torch.equal(loss, evaluated_loss)


def test_generation_reads_the_same_state_as_evaluation(model: EquilibriumLM) -> None:
    ids = some_ids(B=2, T=10)
    new = generate(model, ids, 1, temperature=0)[:, -1]
    generated = state_of(model)
    with torch.no_grad():
        logits, _ = model(ids)
    assert torch.equal(generated, state_of(model))
    assert torch.equal(new, logits[:, -1].argmax(-1))


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize("block", ["gated", "damped"])
def test_later_tokens_do_not_move_earlier_logits_beyond_the_tolerance(
    block: str, tol: float, model: EquilibriumLM
) -> None:
    if block == "damped":
        model = fresh("damped")
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    ids, t = some_ids(B=8), 9
    other = torch.cat([ids[:, : t + 1], (ids[:, t + 1 :] + 1) % 21], dim=1)
    with torch.no_grad(), using(model, solver=Anderson(tol=tol)):
        here, _ = model(ids)
        there, _ = model(other)
    early = slice(None, t + 1)
    moved = (here[:, early] - there[:, early]).norm(dim=-1) / here[:, early].norm(dim=-1)
    assert float(moved.max()) <= 10 * tol
    assert float((here - there)[:, t + 1 :].abs().max()) > 0.1  # what did change is seen


def test_the_tolerance_of_training_moves_the_validation_loss_by_less_than_a_thousandth(
    run: Path, model: EquilibriumLM
) -> None:
    corpus = load_corpus(str(run.parent / "text.txt"))
    held_out = windows(corpus.validation, 64, 16, seed=0)
    cpu = torch.device("cpu")
    found = evaluate(model, held_out, 16, cpu)
    exact = []
    for solver in (FixedPoint(tol=1e-6, max_steps=200), Anderson(tol=1e-6, max_steps=200)):
        with using(model, solver=solver, on_failure="raise"):
            exact.append(evaluate(model, held_out, 16, cpu))
    assert exact[0].loss == pytest.approx(exact[1].loss, abs=1e-5)
    assert max(seen.free_residual for seen in exact) < 1e-6 < found.free_residual < 1e-2
    assert abs(found.loss - exact[0].loss) < 1e-3 and found.loss < 2


# Generation


def test_temperature_zero_needs_no_generator_and_takes_the_likeliest_token(
    model: EquilibriumLM,
) -> None:
    ids = some_ids(B=3, T=5)
    first = generate(model, ids, 6, temperature=0)
    assert torch.equal(first, generate(model, ids, 6, temperature=0))
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            likeliest = model(expected)[0][:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, likeliest], dim=1)
    assert torch.equal(first, expected)


def test_top_k_draws_from_the_likeliest_k_and_from_all_of_them(model: EquilibriumLM) -> None:
    ids = some_ids(B=1, T=7).expand(200, -1)
    with torch.no_grad():
        likeliest = model(ids[:1])[0][0, -1].topk(3).indices
    seed = torch.Generator().manual_seed(0)
    drawn = generate(model, ids, 1, temperature=5.0, top_k=3, generator=seed)[:, -1]
    assert set(drawn.tolist()) == set(likeliest.tolist())
    free = generate(model, ids, 1, temperature=5.0, generator=seed)[:, -1]
    assert len(set(free.tolist())) > 3
    greedy = generate(model, ids[:1], 1, top_k=1, generator=seed)[:, -1]
    assert greedy.tolist() == likeliest[:1].tolist()


def test_a_higher_temperature_spreads_the_draws(model: EquilibriumLM) -> None:
    ids = some_ids(B=1, T=7).expand(400, -1)
    kinds = []
    for heat in (0.2, 1.0, 10.0):
        seed = torch.Generator().manual_seed(0)
        drawn = generate(model, ids, 1, temperature=heat, generator=seed)[:, -1]
        kinds.append(len(set(drawn.tolist())))
    assert kinds == sorted(kinds) and kinds[0] < kinds[-1]


def test_text_longer_than_the_context_is_continued_from_its_last_context(
    model: EquilibriumLM,
) -> None:
    ids = some_ids(B=2, T=40)
    long = generate(model, ids, 20, temperature=0)
    short = generate(model, ids[:, -16:], 20, temperature=0)
    assert torch.equal(long[:, :40], ids)
    assert torch.equal(long[:, 40:], short[:, 16:])


def test_a_window_longer_than_the_context_is_refused(model: EquilibriumLM) -> None:
    with pytest.raises(DataError, match="17 tokens do not fit into a context of 16"):
        model(some_ids(T=17))


def test_generation_refuses_what_it_cannot_do(model: EquilibriumLM) -> None:
    ids = some_ids(B=1, T=3)
    assert torch.equal(generate(model, ids, 0), ids)
    with pytest.raises(ConfigError, match="temperature is -1"):
        generate(model, ids, 1, temperature=-1)
    with pytest.raises(ConfigError, match="temperature is nan"):
        generate(model, ids, 1, temperature=math.nan)
    with pytest.raises(ConfigError, match="top_k is 0"):
        generate(model, ids, 1, top_k=0)
    with pytest.raises(ConfigError, match="-2 tokens"):
        generate(model, ids, -2)
    with pytest.raises(DataError, match="the prompt is empty"):
        generate(model, ids[:, :0], 1)
    torch.nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(ConvergenceError, match="logits are not finite"):
        generate(model, ids, 1)


# PyTorch


@pytest.mark.parametrize("block", ["gated", "damped"])
def test_a_step_under_bfloat16_autocast_keeps_the_state_in_float32_and_learns(block: str) -> None:
    model, ids = fresh(block), some_ids()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, loss = model(ids, ids)
            assert loss is not None
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert state_of(model).dtype == torch.float32
        loss.backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())  # type: ignore[arg-type]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_a_gradient_under_autocast_is_that_of_float32_to_the_precision_of_bfloat16() -> None:
    ids = some_ids()
    gradients = []
    for enabled in (False, True):
        model = fresh()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            _, loss = model(ids, ids)
        assert loss is not None
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    exact, rough = gradients
    assert float((exact - rough).norm() / exact.norm()) < 0.02


def test_a_copy_computes_the_same_and_shares_nothing(model: EquilibriumLM) -> None:
    ids = some_ids()
    copied = copy.deepcopy(model)
    assert torch.equal(model(ids)[0], copied(ids)[0])
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1.0)
    _, loss = copied(ids, ids)
    assert loss is not None
    loss.backward()
    assert not torch.equal(model(ids)[0], copied(ids)[0])
    assert all(p.grad is None for p in model.parameters())


OUTSIDE = ["tokens.weight", "positions.weight"], ["norm.weight", "norm.bias", "head.weight"]
ATTENTION = [f"block.dynamics.attention.W_{part}" for part in "QKVO"]


@pytest.mark.parametrize(
    ("block", "inside"),
    [
        (
            "gated",
            [
                "block.dynamics.alpha",
                *("block.dynamics.norm1.weight", "block.dynamics.norm1.bias"),
                *ATTENTION,
                *("block.dynamics.norm2.weight", "block.dynamics.norm2.bias"),
                *("block.dynamics.up.weight", "block.dynamics.up.bias"),
                *("block.dynamics.down.weight", "block.dynamics.down.bias"),
            ],
        ),
        ("damped", ATTENTION),
    ],
)
def test_the_names_in_a_state_dict_are_those_of_the_checkpoints_that_people_have(
    block: str, inside: list[str]
) -> None:
    model = fresh(block)
    assert list(model.state_dict()) == [*OUTSIDE[0], *inside, *OUTSIDE[1]]
    again = EquilibriumLM(replace(SHAPE, block=block))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(some_ids())[0], model(some_ids())[0])


def test_the_default_is_aep_on_a_gated_block_and_every_parameter_gets_a_gradient() -> None:
    model = EquilibriumLM(SHAPE)
    assert [type(e.estimator) for _, e in equilibria(model)] == [AEP]
    _, loss = model(some_ids(), some_ids(seed=1))
    assert loss is not None
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    certificate = model.block.certificate
    assert certificate is not None and certificate.adjoint_result is Result.CONVERGED


def test_untrained_logits_are_nearly_uniform() -> None:
    _, loss = fresh()(some_ids(), some_ids(seed=1))
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(math.log(21), abs=0.05)


def test_the_cross_entropy_is_the_mean_of_minus_log_probability() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    by_hand = [
        -math.log(math.exp(row[k]) / sum(map(math.exp, row)))
        for row, k in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
    ]
    assert float(cross_entropy(logits, targets)) == pytest.approx(sum(by_hand) / 6, rel=1e-6)


def test_a_shape_that_no_model_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown block 'gate': did you mean gated"):
        replace(SHAPE, block="gate")
    with pytest.raises(ConfigError, match="heads must divide"):
        replace(SHAPE, heads=3)
    with pytest.raises(ConfigError, match="vocabulary is 0"):
        replace(SHAPE, vocabulary=0)


# The ordinary transformer


@pytest.mark.parametrize("tie_head", [False, True])
def test_the_ordinary_transformer_learns_generates_and_sees_no_future(tie_head: bool) -> None:
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, layers=2, tie_head=tie_head))
    assert (model.head.weight is model.tokens.weight) == tie_head
    ids = some_ids()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        _, loss = model(ids, ids)
        assert loss is not None
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    other = torch.cat([ids[:, :10], (ids[:, 10:] + 1) % 21], dim=1)
    with torch.no_grad():
        here, there = model(ids)[0], model(other)[0]
    torch.testing.assert_close(here[:, :10], there[:, :10], rtol=0, atol=1e-5)
    assert float((here - there)[:, 10:].abs().max()) > 0.01
    assert generate(model, ids[:1], 20, temperature=0).shape == (1, 36)


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
