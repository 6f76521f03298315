"""What makes a run that run and no other: its configuration, its vocabulary and its text.

A checkpoint holds all of it, so that nobody goes on from it under other settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from altprop import CheckpointError
from altprop.errors import listed
from altprop.lab.checkpoint import Checkpoint
from altprop.lab.config import WRITES
from altprop.lab.settings import TrainConfig
from altprop.lab.values import plain
from altprop.lm.text import AbstractTokenizer, Corpus, absolute, describe, names_tokenizer

# what a resumed run may change without becoming another run
_FREE = {
    *("steps", "eval_every", "save_every", "device", "sample", "on_failure", "refused_in_a_row"),
    *("final_windows", "parallel", "microbatches", "accumulate", "threads", "compile"),
    *("checkpointing", "log", "quiet"),
}
# what says where a text is, which may change as long as it is the same text
_PLACES = {"data", "validation", "pattern"}

_MISSING, _FILE = object(), object()


@dataclass(frozen=True)
class Identity:
    """The options by name, as `config.yaml` has them, and the digests of vocabulary and text."""

    options: Mapping[str, Any]
    vocabulary: str
    text: Mapping[str, str]

    @classmethod
    def of(cls, config: TrainConfig, corpus: Corpus) -> Identity:
        """Return what a run of that configuration on that corpus is.

        **Raises:** `ConfigError` for a configuration that no file can hold.
        """
        facts = describe(corpus)
        text = {name: facts[name] for name in ("train_sha256", "validation_sha256")}
        return cls(options_of(config), corpus.tokenizer.digest(), text)

    @classmethod
    def read(cls, saved: Checkpoint, path: Path) -> Identity:
        """Return what a checkpoint says that its run is.

        **Raises:** `CheckpointError` if it does not say so.
        """
        held = saved.notes.get("identity")
        kinds = {"options": dict, "vocabulary": str, "text": dict}
        if not isinstance(held, dict) or {k: type(v) for k, v in held.items()} != kinds:
            raise CheckpointError(f"{path}: does not say which run it is of; take another")
        return cls(**held)

    def changed(self, other: Identity) -> list[str]:
        """Return the options in which the other run differs, those of another text too."""
        names = changed_options(self.options, other.options)
        if self.text == other.text and self.vocabulary == other.vocabulary:
            return [name for name in names if name not in _PLACES]  # the same text, elsewhere
        return names


def options_of(config: TrainConfig) -> dict[str, Any]:
    """Return the options that a run keeps: they mean the same wherever they are read from.

    The folder is that of the file, so the file does not name it; a text is found from any other.
    """
    left_out = {*WRITES, *config.foreign}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in left_out}
    values["data"] = absolute(config.data)
    if config.validation is not None:
        values["validation"] = absolute(config.validation)
    if not names_tokenizer(config.tokenizer):
        values["tokenizer"] = os.path.abspath(os.path.expanduser(str(config.tokenizer)))
    kept: dict[str, Any] = plain(values)
    return kept


def changed_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that make another run, in the order of `TrainConfig`."""
    names = [f.name for f in fields(TrainConfig) if f.name not in _FREE]
    return [name for name in names if _said(one, name) != _said(other, name)]


def _said(options: Mapping[str, Any], name: str) -> Any:
    """Return what an option says; of a tokenizer's file only that it is one, its digest says which.

    What is missing differs from everything, but from what is missing too.
    """
    value = options.get(name, _MISSING)
    a_file = name == "tokenizer" and isinstance(value, str) and not names_tokenizer(value)
    return _FILE if a_file else value


def check_settings(
    saved: Checkpoint, path: Path, config: TrainConfig, tokenizer: AbstractTokenizer
) -> None:
    """Make sure that a checkpoint is of that configuration and vocabulary.

    **Raises:** `CheckpointError` naming what is of another run.
    """
    then = Identity.read(saved, path)
    changed = changed_options(options_of(config), then.options)
    names = [name for name in changed if name not in _PLACES]
    if then.vocabulary != tokenizer.digest():
        names.append(tokenizer.file)
    if names:
        raise CheckpointError(
            f"{path}: of a run with other values of {listed(names)} than its folder holds: give "
            "the checkpoint and the folder of one run"
        )
