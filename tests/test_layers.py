"""Language models of several equilibrium blocks, and dropout in either model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.lab.cli import main
from altprop.lab.run import Run
from altprop.lab.train import train
from altprop.lm.blocks import ModelConfig
from altprop.lm.model import GPT, EquilibriumLM, generate
from lm_runs import assert_equal_bits, small, tensors, words

TIGHT = ap.Anderson(tol=1e-11, max_steps=300)
EXACT = ap.Implicit(tol=1e-10, max_steps=300)
STACKS = ["joint", "separate"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else in a tiny run; tests/test_report.py draws."""
    monkeypatch.setattr("altprop.lab.train.plot_run", lambda folder: folder)


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig(13, **{"context": 9, "d_model": 8, "heads": 2, "layers": 3, **changes})


def gates(model: nn.Module) -> list[nn.Parameter]:
    found = [block.dynamics.gate for _, block in ap.equilibria(model)]
    return [gate for gate in found if gate is not None]


def opened(model: EquilibriumLM, gate: float = 0.3) -> EquilibriumLM:
    """Return the model in float64 with weights of some size and its gates open."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.0 if p.shape[0] in (13, 9) else 0.2)
    for own in gates(model):
        nn.init.uniform_(own, -gate, gate)
    return model.double()


def stacked(stacking: str, estimator: Any = EXACT, solver: Any = TIGHT, **how: Any) -> Any:
    return opened(EquilibriumLM(shape(stacking=stacking, **how), solver, estimator))


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
    assert got.keys() == wanted.keys() == phases.keys()
    for name, exact in wanted.items():
        size = float(exact.norm())
        assert float((got[name] - exact).norm()) <= 1e-7 * size, name
        assert float((phases[name] - exact).norm()) <= 1e-3 * size, name


@pytest.mark.parametrize("stacking", STACKS)
def test_cached_tokens_are_those_of_the_whole_window(stacking: str) -> None:
    model = stacked(stacking).eval()
    out = generate(model, torch.tensor([[1, 2], [3, 4]]), 7, temperature=0)
    assert len(out.unique()) > 4
    for t in range(2, 9):
        logits = model(out[:, :t])[0][:, -1]
        assert torch.equal(logits.argmax(-1), out[:, t])


@pytest.mark.parametrize("stacking", STACKS)
def test_tokens_that_come_in_pieces_have_the_states_of_the_whole_window(stacking: str) -> None:
    block = stacked(stacking).block
    x, cache, pieces = torch.randn(2, 9, 8, dtype=torch.float64), None, []
    for part in x.split([3, 1, 1, 4], dim=1):
        z, cache = block.extend(part, cache)
        pieces.append(z)
    with torch.no_grad():
        assert (torch.cat(pieces, 1) - block(x)).abs().max() < 1e-8


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
