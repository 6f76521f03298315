"""Options of speed and memory change what a run costs, and none of its numbers but by rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import altprop as ap
from altprop.auditing.memory import peak_live_bytes
from altprop.lab.ranks import Ranks
from altprop.lab.settings import TrainConfig
from altprop.lab.speed import compile_parts, threads
from altprop.lab.train import train
from altprop.lm.model import GPT, Block, EquilibriumLM, ModelConfig
from lm_runs import assert_equal_bits, small, steps, tensors
from ranks import CASES, apart, learned

pytestmark = pytest.mark.usefixtures("no_curves")

RULES = [name for name, options in CASES.items() if "model" in options]


def counted(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], see: Callable[[], Any]) -> Any:
    """Return a list that grows at every call of a kind of module by what is to be seen then."""
    seen: list[Any] = []
    forward = kind.forward

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(see())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    return seen


@pytest.mark.parametrize("name", RULES)
def test_checkpointing_computes_blocks_twice_and_changes_no_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, Block, torch.is_grad_enabled)
    plain = learned(name, Ranks())
    once = calls.count(True)
    calls.clear()
    kept = learned(name, Ranks(), checkpointing=True)
    assert_equal_bits(kept, plain)
    assert calls.count(True) > once  # those of the recomputation


def test_checkpointing_keeps_less() -> None:
    ids = torch.zeros(8, 32, dtype=torch.long)

    def peak(checkpointing: bool) -> int:
        torch.manual_seed(0)
        model = GPT(ModelConfig(11, 32, 32, 2, layers=8), checkpointing)
        return int(peak_live_bytes(lambda: model(ids, ids)[1].backward()))

    assert peak(True) < 0.6 * peak(False)


@pytest.mark.parametrize("model", [{}, {"model": "gpt", "layers": 1}])
def test_bf16_is_of_training_passes_alone(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = GPT if model else EquilibriumLM
    seen = counted(
        monkeypatch,
        kind,
        lambda: (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    )
    plain = train(small(tmp_path / "plain", **model))
    assert set(seen) == {(True, False), (False, False)}
    seen.clear()
    half = train(small(tmp_path / "half", dtype="bf16", **model))
    assert set(seen) == {(True, True), (False, False)}
    here, there = tensors(half.folder), tensors(plain.folder)
    assert {k: t.dtype for k, t in here.items()} == {k: t.dtype for k, t in there.items()}
    assert half.loss != plain.loss and half.loss == pytest.approx(plain.loss, rel=5e-3)


# torch's own, while it traces
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("model", [{}, {"model": "gpt", "layers": 1, "rule": ap.SignSymmetry()}])
def test_a_compiled_run_is_the_same_but_for_rounding(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []
    compiling = nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self: compiling(self, backend=backend))
    plain = train(small(tmp_path / "plain", **model)).folder
    assert not graphs
    torch._dynamo.reset()
    fast = train(small(tmp_path / "fast", compile=True, **model)).folder
    assert graphs
    assert max(apart(tensors(plain), tensors(fast)).values()) < 1e-3
    losses = [[record["loss"] for record in steps(folder)] for folder in (plain, fast)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_what_is_compiled_keeps_its_names() -> None:
    model = GPT(ModelConfig(11, 8, 8, 2, layers=1))
    names = list(model.state_dict())
    compile_parts(model, TrainConfig(model="gpt", compile=True))
    assert list(model.state_dict()) == names


def test_threads_are_those_of_the_run_and_then_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen = counted(monkeypatch, EquilibriumLM, torch.get_num_threads)
    train(small(tmp_path / "run", threads=before + 1, steps=2))
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    with pytest.raises(ValueError), threads(before + 1):
        raise ValueError
    assert torch.get_num_threads() == before
