"""What makes a run that run and no other: its configuration, its vocabulary and its text.

A checkpoint holds all of it, so that nobody goes on from it under other settings.
"""

from __future__ import annotations

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
from altprop.lm.text import CharTokenizer, Corpus, describe, names_corpus

# what a resumed run may change without becoming another run; of the data, the place alone
_FREE = {
    *("steps", "eval_every", "save_every", "device", "sample", "on_failure", "refused_in_a_row"),
    *("final_windows", "parallel", "microbatches", "accumulate", "threads", "compile"),
    "checkpointing",
}


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
        """Return the options, and `data` for another text, in which the other run differs."""
        names = changed_options(self.options, other.options)
        if self.text == other.text and self.vocabulary == other.vocabulary:
            return [name for name in names if name != "data"]  # the same text, elsewhere
        return names


def options_of(config: TrainConfig) -> dict[str, Any]:
    """Return the options that a run keeps: they mean the same wherever they are read from.

    The folder is that of the file, so the file does not name it; a text is found from any other.
    """
    left_out = {*WRITES, *config.foreign}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in left_out}
    if not names_corpus(config.data):
        values["data"] = str(Path(config.data).expanduser().absolute())
    kept: dict[str, Any] = plain(values)
    return kept


def changed_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that make another run, in the order of `TrainConfig`."""
    missing = object()
    names = [f.name for f in fields(TrainConfig) if f.name not in _FREE]
    return [name for name in names if one.get(name, missing) != other.get(name, missing)]


def check_settings(
    saved: Checkpoint, path: Path, config: TrainConfig, tokenizer: CharTokenizer
) -> None:
    """Make sure that a checkpoint is of that configuration and vocabulary.

    **Raises:** `CheckpointError` naming what is of another run.
    """
    then = Identity.read(saved, path)
    names = [n for n in changed_options(options_of(config), then.options) if n != "data"]
    if then.vocabulary != tokenizer.digest():
        names.append("vocab.json")
    if names:
        raise CheckpointError(
            f"{path}: of a run with other values of {listed(names)} than its folder holds: give "
            "the checkpoint and the folder of one run"
        )
