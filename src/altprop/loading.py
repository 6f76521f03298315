"""What `altprop train` left behind, for a program of one's own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from altprop.errors import CheckpointError
from altprop.reading import place


@dataclass(frozen=True)
class LoadedRun:
    """A run that has been read back.

    `folder`; `model`, a language model in eval mode, its rules in place; `tokenizer`, with `encode`
    and `decode`; `config`, the run's options by name (`altprop.lab.settings.TrainConfig`).
    """

    folder: Path
    model: nn.Module
    tokenizer: Any
    config: Any


def load(
    run: str | Path, *, which: Literal["best", "last"] = "best", device: str = "cpu"
) -> LoadedRun:
    """Read a run of `altprop train`: its model, its tokenizer and what it was configured with.

    **Arguments:** `run`, its folder; `which`, the checkpoint of the lowest validation loss or the
    last one; `device`, where the model goes.

    **Raises:** `CheckpointError` if the folder or the checkpoint is no run of altprop's;
    `ConfigError` for another checkpoint or a device that is not there.
    """
    folder = place(run, CheckpointError)
    # the application is built on the library, which finds it by name, as the command line does
    application = importlib.import_module("altprop.lab.sample_command")
    model, tokenizer = application.load_run(folder, which, device)
    return LoadedRun(folder, model, tokenizer, application.config_of(folder))
