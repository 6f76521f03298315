"""A tiny text and a tiny run, for the tests of the application."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytest import MonkeyPatch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from altprop.lab import checkpoint
from altprop.lab.config import read_config, to_yaml
from altprop.lab.identity import options_of
from altprop.lab.reporting.metrics import read_metrics
from altprop.lab.run import Run
from altprop.lab.seal import sealed
from altprop.lab.settings import TrainConfig

SMALL: dict[str, Any] = {
    "d_model": 16,
    "heads": 2,
    "context": 16,
    "batch": 4,
    "steps": 8,
    "warmup": 3,
    "eval_every": 4,
    "eval_windows": 8,
    "sample": 0,
    "device": "cpu",
}


def sentences(count: int = 200) -> str:
    """Return repetitive sentences of 21 different characters, about 25 of them each."""
    draw = random.Random(0)
    who = ["the cat", "a dog", "the old man", "my friend", "the king"]
    does = ["sees", "likes", "finds", "follows"]
    return "".join(
        f"{draw.choice(who)} {draw.choice(does)} {draw.choice(who)}.\n" for _ in range(count)
    )


def small(out: Path, **changes: Any) -> TrainConfig:
    """Return a run of a second in the folder `out`, on sentences in a file beside it."""
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text(sentences(), encoding="utf-8")
    return replace(TrainConfig(), **{"data": str(text), "out": out, **SMALL, **changes})


def words(config: TrainConfig, *names: str) -> list[str]:
    """Return the small run as words of the command line, with these options of `config` too."""
    named = {name: getattr(config, name) for name in ("data", "out", *SMALL, *names)}
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def when_logged(
    patch: MonkeyPatch, step: int, act: Callable[[], None], metric: str = "loss"
) -> None:
    """Call `act` once the record of this step that holds `metric` has been written."""
    log = Run.log

    def logged(self: Run, record: dict[str, Any]) -> None:
        log(self, record)
        if record["step"] == step and metric in record:
            act()

    patch.setattr(Run, "log", logged)


def step_of(folder: Path, which: str = "last") -> int:
    """Return the step of a run's checkpoint."""
    return int(checkpoint.load(folder / f"{which}.safetensors").notes["progress"]["step"])


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return what a run measured, but for the times."""
    return [
        {key: value for key, value in record.items() if key != "tokens_per_second"}
        for record in read_metrics(folder)
    ]


def steps(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the steps, without those of the evaluations."""
    return [record for record in curve(folder) if "loss" in record]


def tensors(folder: Path, which: str = "last") -> dict[str, Tensor]:
    """Return every tensor of a run's checkpoint by group and name."""
    saved = checkpoint.load(folder / f"{which}.safetensors")
    names = ("model", "training", "optimiser", "extra")
    groups = {name: getattr(saved, name) for name in names}
    return {f"{group}.{k}": v for group, held in groups.items() for k, v in held.items()}


def reconfigure(folder: Path, without: str = "", **changes: Any) -> None:
    """Let a run have been started with other options, or without one, its checkpoints too."""
    config = replace(read_config(folder / "config.yaml", TrainConfig), **changes)
    options = {name: value for name, value in options_of(config).items() if name != without}
    (folder / "config.yaml").write_bytes(sealed(to_yaml(options)))
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        notes = json.loads(header["notes"])
        notes["identity"]["options"] = options
        header["notes"] = json.dumps(notes)
        save_file(load_file(path), path, {**header, "digest": checkpoint._digest(header)})


def assert_equal_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder, with the content of its files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
