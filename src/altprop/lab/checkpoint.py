"""A checkpoint is one safetensors file that is either whole or not there.

It holds the model (`model.…`), the optimiser's moments (`optimiser.<parameter>.<moment>`) and what
else a run needs to go on (`extra.…`); the header says what wrote it and at which step. Where the
model is an average over a run, `training.…` holds the weights that the optimiser moves. The header
also holds a checksum of every tensor and of itself, so that a file with a flipped bit is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from altprop import CheckpointError
from altprop.files import replacing, sync
from altprop.lab.ranks import full, like

FORMAT = "altprop/2"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by group and name, and the plain data of its header."""

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    extra: dict[str, Tensor]
    notes: dict[str, Any]


def collect(
    model: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    extra: Mapping[str, Tensor],
    average: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, whole and on the CPU; all ranks must ask for them.

    **Arguments:** `extra`, more tensors by name; `average`, a model of the same names that the file
    holds as its model, beside the `model` that trains.
    """
    models = {"model": model} if average is None else {"model": average, "training": model}
    tensors = {f"{group}.{k}": v for group, m in models.items() for k, v in m.state_dict().items()}
    if optimiser is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimiser.state.get(parameter, {}).items():
                tensors[f"optimiser.{name}.{key}"] = torch.as_tensor(value)
    tensors |= {f"extra.{k}": v for k, v in extra.items()}
    # clone: tied parameters share storage, which the format refuses
    return {k: full(v.detach()).cpu().contiguous().clone() for k, v in tensors.items()}


def save(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    extra: Mapping[str, Tensor],
    notes: Mapping[str, Any],
    average: nn.Module | None = None,
    before: Path | None = None,
) -> None:
    """Write what `collect` returns of these, as `write` does."""
    write(path, collect(model, optimiser, extra, average), notes, before)


def write(
    path: Path, whole: Mapping[str, Tensor], notes: Mapping[str, Any], before: Path | None = None
) -> None:
    """Write a checkpoint in one step: a reader finds the old file or the new one, whole.

    It has been read back and compared before it takes its name.

    **Arguments:** `whole`, what `collect` returned; `notes`, plain data for the header; `before`,
    where the old file goes, if it is to be kept.

    **Raises:** `CheckpointError` if it cannot be written, a full disk for one.
    """
    header = {
        "format": FORMAT,
        "notes": json.dumps(dict(notes)),
        "sums": json.dumps({name: _sum(tensor) for name, tensor in whole.items()}),
    }
    header["digest"] = _digest(header)
    try:
        with replacing(path) as fresh:
            save_file(dict(whole), fresh, header)
            sync(fresh)
            for _ in _verified(fresh, header):
                pass
            if before is not None and path.exists():
                os.replace(path, before)
    except (SafetensorError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be written ({why})") from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, and compare every tensor with its checksum.

    **Raises:** `CheckpointError` if the file is missing, truncated, changed, or not altprop's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint; give a run folder of train")
    groups: dict[str, dict[str, Tensor]] = {
        group: {} for group in ("model", "training", "optimiser", "extra")
    }
    header: dict[str, str] = {}
    try:
        for name, tensor in _verified(path, header):
            group, _, key = name.partition(".")
            groups[group][key] = tensor
        notes = dict(json.loads(header["notes"]))
    except (
        *(SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError),
        RecursionError,  # of notes nested without end
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint ({error}); take another or train again"
        ) from error
    return Checkpoint(**groups, notes=notes)


def _verified(path: Path, header: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's tensors by name, each checked, and fill in the `header`, or compare with it.

    **Raises:** `CheckpointError` for what is not as it was written.
    """
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: not a checkpoint of this version of altprop (its header says format "
                f"{found.get('format')!r}, expected {FORMAT!r})"
            )
        sums = dict(json.loads(found["sums"]))
        whole = found["digest"] == _digest(found) and sums.keys() == set(file.keys())
        if not whole or header and header != found:
            raise CheckpointError(
                f"{path}: damaged: its header is not as it was written; take another or train again"
            )
        header.update(found)
        for name in file.keys():
            # a copy: what safetensors gives is mapped, and changes or faults with the file
            tensor = file.get_tensor(name).clone()
            if _sum(tensor) != sums[name]:
                raise CheckpointError(
                    f"{path}: damaged: {name} is not as it was written; take another or train again"
                )
            yield name, tensor


def _sum(tensor: Tensor) -> str:
    """Return the checksum of a tensor on the CPU: of its type, its shape and its bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(header: Mapping[str, str]) -> str:
    parts = [header["format"], header["notes"], header["sums"]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def restore_model(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load the model's part, strictly: names, shapes and types.

    **Raises:** `CheckpointError` naming what does not fit.
    """
    held, fitting = model.state_dict(), dict(checkpoint.model)
    for name, value in held.items():
        found = checkpoint.model.get(name, value)
        if found.dtype != value.dtype:
            raise CheckpointError(
                f"{path}: not of this configuration's model: {name} is of {found.dtype}, expected "
                f"{value.dtype}"
            )
        if name in fitting and found.shape == value.shape:
            fitting[name] = like(found, value)
    try:
        model.load_state_dict(fitting)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path}: not of this configuration's model: {first}") from None


def restore_optimiser(
    model: nn.Module, optimiser: torch.optim.Optimizer, checkpoint: Checkpoint, path: Path
) -> None:
    """Give the optimiser, an AdamW, back its moments, by the parameters' names.

    **Raises:** `CheckpointError` naming the parameter whose moments do not fit.
    """
    parameters = dict(model.named_parameters())
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in checkpoint.optimiser.items():
        name, _, moment = key.rpartition(".")
        moments.setdefault(name, {})[moment] = value
    for name, found in moments.items():
        parameter = parameters.get(name)
        if parameter is None or found.keys() != MOMENTS or not _fit(parameter, found):
            held = ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in sorted(found.items()))
            raise CheckpointError(
                f"{path}: not of this configuration's optimiser: it has moments of {name!r} that "
                f"do not fit ({held})"
            )
        optimiser.state[parameter] = {
            key: value if key == "step" else like(value, parameter) for key, value in found.items()
        }


def _fit(parameter: Tensor, moments: Mapping[str, Tensor]) -> bool:
    """Tell whether AdamW's moments are of that parameter."""
    step, *means = (moments[name] for name in ("step", "exp_avg", "exp_avg_sq"))
    return (step.dtype, step.shape) == (torch.float32, torch.Size()) and all(
        (mean.dtype, mean.shape) == (parameter.dtype, parameter.shape) for mean in means
    )
