"""Write text with a trained model."""

from __future__ import annotations

import sys
import warnings
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import torch

from altprop import CheckpointError, ConfigError, using
from altprop.errors import unknown
from altprop.lab import checkpoint
from altprop.lab.building import build_model
from altprop.lab.config import read_config
from altprop.lab.identity import check_settings
from altprop.lab.settings import TrainConfig
from altprop.lab.train import pick_device
from altprop.lm.model import LanguageModel, stream
from altprop.lm.text import AbstractTokenizer, read_tokenizer
from altprop.terminal import printable

Which = Literal["best", "last"]


def load_run(
    run: Path, which: Which = "best", device: str = "auto"
) -> tuple[LanguageModel, AbstractTokenizer]:
    """Return a run's model, on `device`, and its tokenizer.

    **Arguments:** `run`, the folder of a training run; `which`, `best` or `last`.

    **Raises:** `CheckpointError` if the folder or the checkpoint is no run of altprop's;
    `ConfigError` for another checkpoint or a device that is not there.
    """
    if which not in get_args(Which):
        raise unknown("checkpoint", which, get_args(Which))
    tokenizer = read_tokenizer(run) if run.is_dir() else None
    for name, there in (
        ("config.yaml", (run / "config.yaml").is_file()),
        ("vocab.json or tokenizer.json", tokenizer is not None),
    ):
        if not there:
            raise CheckpointError(f"{run}: no {name} there; give the folder of a training run")
    assert tokenizer is not None
    config = config_of(run)
    path = run / f"{which}.safetensors"
    kept = [name for name in get_args(Which) if (run / f"{name}.safetensors").is_file()]
    if kept and which not in kept:
        raise CheckpointError(
            f"{path}: there is no such checkpoint, the run has kept {kept[0]} alone (the best is "
            f"of an evaluation at a fixed point): write --which {kept[0]}"
        )
    saved = checkpoint.load(path)
    check_settings(saved, path, config, tokenizer)
    model = build_model(config, len(tokenizer)).to(pick_device(device))
    checkpoint.restore_model(model, saved, path)
    return model.eval(), tokenizer


def config_of(run: Path) -> TrainConfig:
    """Return what a run was configured with; it raises as `read_config`."""
    return read_config(run / "config.yaml", TrainConfig)


def _write(text: str) -> None:
    """Write a piece of text at once; a terminal obeys nothing in it but its lines."""
    print(printable(text, keep="\n\t"), end="", flush=True)


def sample(
    run: Path,
    *,
    prompt: str | None = None,
    tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    which: Which = "best",
    device: str = "auto",
) -> None:
    """Write text with a trained model.

    Args:
        run: the folder of a training run.
        prompt: the text to continue; its characters must be in the run's vocabulary. Unless given
            (or null), a line break, or where the vocabulary has none a space, or else its first
            token.
        tokens: how many tokens to write.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep only the likeliest so many tokens; null for all.
        seed: of the draws.
        which: the checkpoint: that of the lowest validation loss, or the last.
        device: `auto`, `cpu`, `cuda`, or any other that torch knows.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}, expected in [0, 2^63)")
    model, tokenizer = load_run(run, which, device)
    start = tokenizer.opening() if prompt is None else tokenizer.encode(prompt)
    ids = torch.as_tensor(start.astype("int64")).unsqueeze(0)
    ids = ids.to(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    news = stream(model, ids, tokens, temperature=temperature, top_k=top_k, generator=generator)
    with using(model, on_failure="warn"), warnings.catch_warnings(record=True) as unsettled:
        warnings.simplefilter("always", RuntimeWarning)
        written = chain.from_iterable(new[0].tolist() for new in news)
        for piece in tokenizer.pieces(chain(start.tolist(), written)):
            _write(piece)
    print()
    if unsettled:
        print(
            f"altprop: warning: {len(unsettled)} of {tokens} tokens were read from a state that "
            f"is no equilibrium; the last one: {printable(str(unsettled[-1].message))}",
            file=sys.stderr,
        )
