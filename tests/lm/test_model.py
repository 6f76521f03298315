"""Language models read one and the same equilibrium in training and evaluation, and they learn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import STACKS, gates, shape, some_ids, stacked
from torch import Tensor, nn

import altprop as ap
from altprop.lab.cli import main
from altprop.lab.evaluation import evaluate
from altprop.lab.run import Run
from altprop.lab.sample_command import load_run
from altprop.lab.train import train
from altprop.lm.model import GPT, EquilibriumLM, cross_entropy
from altprop.lm.text import load_corpus, windows
from lm_runs import assert_equal_bits, small, tensors, words
from systems import EXACT, TIGHT, error, flat, worst

pytestmark = pytest.mark.usefixtures("no_curves")


# one definition of the state


def test_training_and_evaluation_read_the_same_state_bit_for_bit() -> None:
    model, ids = stacked("joint", ap.AEP(), ap.Anderson()), some_ids()
    trained, loss = model.train()(ids, ids)
    state = model.block.certificate.state
    with torch.no_grad():
        evaluated, evaluated_loss = model.eval()(ids, ids)
    assert loss.requires_grad and torch.equal(state, model.block.certificate.state)
    assert torch.equal(trained, evaluated) and torch.equal(loss, evaluated_loss)


def test_the_tolerance_of_training_moves_the_validation_loss_by_less_than_a_thousandth(
    tmp_path: Path,
) -> None:
    train(small(tmp_path / "run", steps=150, eval_every=150, lr=1e-2))
    model, _ = load_run(tmp_path / "run", "last", "cpu")
    assert float(model.block.dynamics.alpha.detach().abs().max()) > 0.02  # the feedback is in use
    held_out = windows(load_corpus(str(tmp_path / "text.txt")).validation, 64, 16, seed=0)
    found = evaluate(model, held_out, 16, torch.device("cpu"))
    exact = []
    for solver in (ap.FixedPoint(tol=1e-6, max_steps=200), ap.Anderson(tol=1e-6, max_steps=200)):
        with ap.using(model, solver=solver, on_failure="raise"):
            exact.append(evaluate(model, held_out, 16, torch.device("cpu")))
    assert exact[0].loss == pytest.approx(exact[1].loss, abs=1e-5)
    assert max(seen.free_residual for seen in exact) < 1e-6 < found.free_residual < 1e-2
    assert abs(found.loss - exact[0].loss) < 1e-3 and found.loss < 2


# several blocks


def copied(gpt: GPT, blocks: list[Any]) -> None:
    """Give the blocks of an equilibrium model the weights of a GPT's."""
    for own, other in zip(blocks, gpt.blocks, strict=True):
        attention, attn, mlp = own.attention, other.attn, other.mlp
        for name, theirs in zip("QKVO", "qkvo", strict=True):
            getattr(attention, f"W_{name}").data = getattr(attn, f"{theirs}_proj").weight.data
        own.norm1.load_state_dict(attn.norm.state_dict())
        own.norm2.load_state_dict(mlp.norm.state_dict())
        own.up.load_state_dict(mlp.up_proj.state_dict())
        own.down.load_state_dict(mlp.down_proj.state_dict())


@pytest.mark.parametrize("stacking", STACKS)
def test_with_closed_gates_it_is_the_gpt_of_as_many_blocks(stacking: str) -> None:
    torch.manual_seed(3)
    gpt = GPT(shape()).double()
    for p in gpt.parameters():
        nn.init.normal_(p, std=0.3)
    model = EquilibriumLM(shape(stacking=stacking), TIGHT, EXACT).double()
    if stacking == "joint":
        dynamics = model.block.dynamics
        copied(gpt, [dynamics.first, *dynamics.rest])
    else:
        copied(gpt, [block.dynamics for block in model.block.blocks])
    for name in ("tokens", "positions", "norm", "head"):
        getattr(model, name).load_state_dict(getattr(gpt, name).state_dict())
    ids = torch.randint(13, (2, 9))
    assert all(not gate.any() for gate in gates(model))
    assert torch.allclose(model(ids)[0], gpt(ids)[0], rtol=1e-10, atol=1e-11)


def gradients(model: nn.Module, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(11)  # of dropout
    model(ids, targets)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "estimator",
    [ap.AEP(), ap.EP(), ap.DyadicEP(), ap.PublishedEP(), ap.PublishedAEP()],
    ids=lambda estimator: type(estimator).__name__,
)
def test_the_cost_that_nudges_has_the_mask_of_the_loss(estimator: Any) -> None:
    """So it gives what the loss's own cotangent gives, which depends on the mask, up to `O(β²)`."""
    ids, targets = torch.randint(13, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    by_cost, by_cotangent = (
        gradients(stacked("joint", replace(estimator, nudge=kind), dropout=0.4), ids, targets)
        for kind in ("cost", "linear")
    )
    assert worst(by_cost, by_cotangent) <= 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("stacking", STACKS)
def test_its_gradient_is_that_of_a_long_unroll(stacking: str, dropout: float) -> None:
    """With dropout under the same masks, which one draw gives to the whole relaxation."""
    ids, targets = torch.randint(13, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    model = stacked(stacking, dropout=dropout)
    got = gradients(model, ids, targets)
    with ap.using(model, ap.BPTT(), ap.FixedPoint(tol=0, max_steps=80)):
        wanted = gradients(model, ids, targets)
    with ap.using(model, ap.AEP()):
        phases = gradients(model, ids, targets)
    assert worst(got, wanted) <= 1e-7 and worst(phases, wanted) <= 1e-3


def test_each_of_separate_equilibria_is_solved_under_the_one_before() -> None:
    model, ids = stacked("separate"), torch.randint(13, (2, 9))
    h = model.tokens(ids) + model.positions.weight
    for _, block in ap.equilibria(model):
        h = block(h)
        assert float(block.certificate.free_residual.max()) < 1e-10
    assert len(gates(model)) == 3
    assert torch.allclose(model(ids)[0], model.head(model.norm(h)), rtol=1e-9, atol=1e-10)


def test_without_layers_a_gpt_has_four_and_an_equilibrium_one() -> None:
    assert len(GPT(shape(layers=None)).blocks) == 4
    assert isinstance(EquilibriumLM(shape(layers=None)).block.dynamics, ap.GatedBlock)


@pytest.mark.parametrize("make", [GPT, EquilibriumLM], ids=["gpt", "equilibrium"])
def test_dropout_acts_in_training_alone(make: Any) -> None:
    torch.manual_seed(0)
    plain, model = make(shape()), make(shape(dropout=0.5))
    model.load_state_dict(plain.state_dict())
    ids = torch.randint(13, (2, 9))
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(ids)[0], plain(ids)[0])
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn, nor without dropout
    first, second = (model.train()(ids)[0] for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 2, "dropout": 0.3},
        {"layers": 2, "stacking": "separate", "dropout": 0.3, "ema": 0.5},
        {"model": "gpt", "layers": 2, "dropout": 0.3},
    ],
    ids=["joint", "separate", "gpt"],
)
def test_a_run_goes_on_as_if_it_had_not_stopped(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(small(tmp_path / "whole", **changes))
    assert whole.refused == 0
    save = Run.save

    def stop(self: Run, name: str, *args: Any, **kwargs: Any) -> None:
        save(self, name, *args, **kwargs)
        if name == "last":
            raise KeyboardInterrupt

    config = small(tmp_path / "parts", **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", stop)
        train(config)
    resumed = small(tmp_path / "parts", **changes, resume=True)
    assert train(resumed).loss == whole.loss
    assert_equal_bits(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--layers", "0"], "layers is 0, expected at least 1"),
        (["--layers", "2", "--block", "damped"], "block damped has no joint dynamics of 2 layers"),
        (["--stacking", "apart"], "unknown stacking 'apart'"),
        (["--stacking", "separate"], "stacking is separate, but there is one layer"),
        (["--dropout", "1"], "dropout is 1.0, expected in [0, 1)"),
        (["--model", "gpt", "--stacking", "separate"], "model gpt has no stacking"),
        (
            ["--layers", "2", "--stacking", "separate", "--estimator", "PublishedEP"],
            "PublishedEP(nudge='cost') nudges with the cost of its state",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words(small(tmp_path / "run")), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


# PyTorch


@pytest.mark.parametrize("block", ["gated", "damped"])
def test_a_step_under_bfloat16_autocast_keeps_the_state_in_float32_and_learns(block: str) -> None:
    torch.manual_seed(0)
    model, ids = EquilibriumLM(shape(block=block, layers=1)), some_ids(B=4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found, losses = [], []
    for enabled in (False, *[True] * 8):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits, loss = model(ids, ids)
        loss.backward()
        found.append(flat([p.grad for p in model.parameters()]))
        if enabled:
            assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
            assert model.block.certificate.state.dtype == torch.float32
            assert bool(found[-1].isfinite().all())
            optimiser.step()
            losses.append(float(loss.detach()))
    assert error(found[1], found[0]) < 0.02  # that of float32 to the precision of bfloat16
    assert losses[-1] < losses[0] - 0.2


ATTENTION = [f"block.dynamics.attention.W_{part}" for part in "QKVO"]
NORMED = [f"block.dynamics.norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
MAPS = [f"block.dynamics.{m}.{part}" for m in ("up", "down") for part in ("weight", "bias")]
INSIDE = {
    "gated": ["block.dynamics.alpha", *NORMED[:2], *ATTENTION, *NORMED[2:], *MAPS],
    "damped": ATTENTION,
}


@pytest.mark.parametrize("block", INSIDE)
def test_the_names_in_a_state_dict_are_those_of_the_checkpoints_that_people_have(
    block: str,
) -> None:
    below, above = ["tokens", "positions"], ["norm.weight", "norm.bias", "head.weight"]
    model, again = (EquilibriumLM(shape(block=block, layers=1)) for _ in range(2))
    names = [*(f"{name}.weight" for name in below), *INSIDE[block], *above]
    assert list(model.state_dict()) == names
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(some_ids())[0], model(some_ids())[0])


def test_the_default_is_aep_on_a_gated_block_and_every_parameter_gets_a_gradient() -> None:
    model = EquilibriumLM(shape(layers=1))
    assert [type(e.estimator) for _, e in ap.equilibria(model)] == [ap.AEP]
    _, loss = model(some_ids(), some_ids(seed=1))
    assert float(loss.detach()) == pytest.approx(
        math.log(13), abs=0.05
    )  # untrained, nearly uniform
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    assert model.block.certificate.adjoint_result is ap.Result.CONVERGED


def test_the_cross_entropy_is_the_mean_of_minus_log_probability() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    by_hand = [
        -math.log(math.exp(row[k]) / sum(map(math.exp, row)))
        for row, k in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
    ]
    assert float(cross_entropy(logits, targets)) == pytest.approx(sum(by_hand) / 6, rel=1e-6)


def test_a_shape_that_no_model_can_have_is_refused_and_a_window_too_long_for_it() -> None:
    for wrong, message in (
        ({"block": "gate"}, "unknown block 'gate': did you mean gated"),
        ({"heads": 3}, "heads must divide"),
        ({"vocabulary": 0}, "vocabulary is 0"),
    ):
        with pytest.raises(ap.ConfigError, match=message):
            replace(shape(), **wrong)
    with pytest.raises(ap.DataError, match="10 tokens do not fit into a context of 9"):
        EquilibriumLM(shape(layers=1))(some_ids(T=10))


@pytest.mark.parametrize("tie_head", [False, True])
def test_the_ordinary_transformer_learns_and_sees_no_future(tie_head: bool) -> None:
    torch.manual_seed(0)
    model, ids = GPT(shape(layers=2, tie_head=tie_head)), some_ids(B=4)
    assert (model.head.weight is model.tokens.weight) == tie_head
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        _, loss = model(ids, ids)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    other = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 13], dim=1)
    with torch.no_grad():
        here, there = model(ids)[0], model(other)[0]
    torch.testing.assert_close(here[:, :5], there[:, :5], rtol=0, atol=1e-5)
    assert float((here - there)[:, 5:].abs().max()) > 0.01
