"""A checkpoint is one safetensors file that is either whole or not there.

It holds the model (`model.…`), the optimiser's moments (`optimiser.<parameter>.<moment>`) and what
else a run needs to go on (`extra.…`); the header says what wrote it and at which step. Where the
model is an average over a run, `training.…` holds the weights that the optimiser moves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from altprop import CheckpointError
from altprop.files import replacing

FORMAT = "altprop/1"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by group and name, and the plain data of its header."""

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    extra: dict[str, Tensor]
    notes: dict[str, Any]


def save(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    extra: Mapping[str, Tensor],
    notes: Mapping[str, Any],
    average: nn.Module | None = None,
) -> None:
    """Write a checkpoint in one step: a reader finds the old file or the new one, whole.

    **Arguments:** `extra`, more tensors by name; `notes`, plain data for the header; `average`, a
    model of the same names that the file holds as its model, beside the `model` that trains.

    **Raises:** `CheckpointError` if it cannot be written, a full disk for one.
    """
    models = {"model": model} if average is None else {"model": average, "training": model}
    tensors = {f"{group}.{k}": v for group, m in models.items() for k, v in m.state_dict().items()}
    if optimiser is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimiser.state.get(parameter, {}).items():
                tensors[f"optimiser.{name}.{key}"] = torch.as_tensor(value)
    tensors |= {f"extra.{k}": v for k, v in extra.items()}
    # clone: tied parameters share storage, which the format refuses
    whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        with replacing(path) as fresh:
            save_file(whole, fresh, {"format": FORMAT, "notes": json.dumps(dict(notes))})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    **Raises:** `CheckpointError` if the file is missing, truncated, or not altprop's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; give a run folder of train")
    groups: dict[str, dict[str, Tensor]] = {
        group: {} for group in ("model", "training", "optimiser", "extra")
    }
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: not a checkpoint of this version of altprop (its header says format "
                    f"{header.get('format')!r}, expected {FORMAT!r})"
                )
            notes = dict(json.loads(header["notes"]))
            for name in file.keys():
                group, _, key = name.partition(".")
                # a copy: what safetensors gives is mapped, and changes or faults with the file
                groups[group][key] = file.get_tensor(name).clone()
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint ({error}); take another or train again"
        ) from error
    return Checkpoint(**groups, notes=notes)


def restore_model(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load the model's part, strictly.

    **Raises:** `CheckpointError` naming what does not fit.
    """
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path}: not of this configuration's model: {first}") from None


def restore_optimiser(
    model: nn.Module, optimiser: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Give the optimiser back its moments, by the parameters' names."""
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        moments = {
            key[len(prefix) :]: value
            for key, value in checkpoint.optimiser.items()
            if key.startswith(prefix) and "." not in key[len(prefix) :]
        }
        if moments:
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter)
                for key, value in moments.items()
            }
