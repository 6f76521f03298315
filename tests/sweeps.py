"""A tiny sweep, of runs whose loss is known, for the tests of sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from altprop.lab.callbacks import Callback
from altprop.lab.settings import TrainConfig
from altprop.lab.train import TrainResult
from lm_runs import SMALL, sentences

BASE: dict[str, Any] = {**SMALL, "data": "text.txt", "model": "gpt", "layers": 1}
RATES = {"low": 1e-4, "high": 1e-3, "log": True}


def spec(searched: Mapping[str, Any], name: str = "spec.yaml", **base: Any) -> Path:
    Path(name).write_text(yaml.safe_dump({**BASE, **base, "sweep": dict(searched)}))
    return Path(name)


def closed_form(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[[TrainConfig], float]
) -> list[TrainConfig]:
    """Let runs end at a loss that is known, falling towards it; return them as they are made."""
    made: list[TrainConfig] = []

    def train(config: TrainConfig, callbacks: Sequence[Callback]) -> TrainResult:
        made.append(config)
        least = loss(config)
        for step in (1, 2, 3):
            record = {"step": step, "validation_loss": least + 1 / step, "validation_settled": True}
            for callback in callbacks:
                callback.on_evaluation(record)
        return TrainResult(config.out or Path(), least, least, least, True, 0, "")

    monkeypatch.setattr("altprop.lab.sweep.workers.train", train)
    return made


def study(folder: str = "s") -> Any:
    """Open a sweep's file as anybody may."""
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db")


def kept(folder: str) -> list[Any]:
    """Return what is kept of every trial, without the times."""
    return [(t.number, t.state, t.params, t.value, t.intermediate_values)
            for t in study(folder).trials]  # fmt: skip


def off(config: TrainConfig) -> float:
    """A loss whose least is at a rate of 1e-2."""
    return math.log10(config.lr / 1e-2) ** 2


def begin_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that holds a text. No sweep is drawn: that would take the longest."""
    monkeypatch.setattr("altprop.lab.sweep.command.plot_sweep", lambda *_: _[-1])
    monkeypatch.chdir(folder)
    Path("text.txt").write_text(sentences(), encoding="utf-8")
    return folder
