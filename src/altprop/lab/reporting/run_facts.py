"""What can still be found out of a run's folder: what its model reads backwards, and writes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from altprop import ConfigError, RuleError, explain, using, watch
from altprop.lab.building import count_parameters
from altprop.lab.config import read_config
from altprop.lab.record import read_record
from altprop.lab.reporting.metrics import Records, read_metrics
from altprop.lab.sample_command import load_run
from altprop.lab.settings import TrainConfig
from altprop.lm.model import LanguageModel, generate
from altprop.lm.text import AbstractTokenizer


@dataclass(frozen=True)
class RunFacts:
    """A run's folder; `record`, the command that made it, the versions and the machine.

    **Arguments:** `which`, the checkpoint that the rest is of, if the run has kept one;
    `explained` and `notes`, what `explain` says, if the model has a rule; `read`, how each
    parameter was read in one backward pass; `sample`, what the model writes; `unsettled`, how many
    of its tokens were read from a state that is no equilibrium.
    """

    folder: Path
    config: TrainConfig
    records: Records
    record: dict[str, Any]
    which: str | None
    parameters: int
    explained: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    read: dict[str, str]
    sample: str
    unsettled: int


def run_facts(folder: Path, sample: int = 400, device: str = "auto") -> RunFacts:
    """Return what a run's folder holds, and what its model does.

    **Arguments:** `sample`, how many tokens it writes.

    **Raises:** `CheckpointError` for a folder that is not whole, `ConfigError` for a configuration
    that cannot be read.
    """
    if sample < 0:
        raise ConfigError(f"sample is {sample}, expected at least 0")
    records = read_metrics(folder)
    config = read_config(folder / "config.yaml", TrainConfig)
    record = read_record(folder)
    kept = [name for name in ("best", "last") if (folder / f"{name}.safetensors").is_file()]
    if not kept:
        return RunFacts(folder, config, records, record, None, 0, (), (), {}, "", 0)
    which = cast(Literal["best", "last"], kept[0])
    model, tokenizer = load_run(folder, which, device)
    read = _read(model, len(tokenizer), config)
    explained, notes = _explain(model, read)
    text, unsettled = _write(model, tokenizer, sample)
    return RunFacts(
        folder=folder,
        config=config,
        records=records,
        record=record,
        which=which,
        parameters=count_parameters(model),
        explained=explained,
        notes=notes,
        read=read,
        sample=text,
        unsettled=unsettled,
    )


def _explain(
    model: LanguageModel, read: Mapping[str, str]
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Return the cells of `explain`'s table and its notes; none of a model without any rule."""
    try:
        table = explain(model, read)
    except RuleError:
        return (), ()
    rows = []
    for row in table.rows:
        shape = "×".join(map(str, row.feedback or ()))
        seed, remains = "" if row.seed is None else str(row.seed), "yes" * row.transports
        cells = (row.parameter, row.rule, row.signal, shape, row.kind, seed, remains, row.measured)
        rows.append(tuple(cell or "–" for cell in cells))
    return tuple(rows), table.notes


def _read(model: LanguageModel, vocabulary: int, config: TrainConfig) -> dict[str, str]:
    """Return how each parameter is read in a backward pass: which, not on what text, matters."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, config.context + 1), generator=drawn)
    ids = ids.to(next(model.parameters()).device)
    with using(model, on_failure="accept"), watch(model) as seen:
        model(ids[:, :-1], ids[:, 1:])[1].backward()
    model.zero_grad(set_to_none=True)
    return {name: str(reading) for name, reading in seen.items()}


def _write(model: LanguageModel, tokenizer: AbstractTokenizer, count: int) -> tuple[str, int]:
    """Return what the model writes, and how many solves of it failed."""
    if count == 0:
        return "", 0
    ids = torch.as_tensor(tokenizer.opening().astype("int64")).unsqueeze(0)
    ids = ids.to(next(model.parameters()).device)
    drawn = torch.Generator().manual_seed(0)
    with using(model, on_failure="warn"), warnings.catch_warnings(record=True) as unsettled:
        warnings.simplefilter("always", RuntimeWarning)
        out = generate(model, ids, count, temperature=0.8, generator=drawn)
    return tokenizer.decode(out[0, ids.shape[1] :].cpu().numpy()), len(unsettled)
