"""Malformed input of every kind that the package reads, drawn at random for `fuzz.py`.

A kind is a function of a random generator, of a folder with good input, which it may spoil, and of
the words of a good tiny run; it returns the words of a command, or what to call in its place, which
ends as the command line does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from hostile.comparisons import compared, good_comparisons
from hostile.models import checkpoint, good_shared, shared
from hostile.options import config, words
from hostile.sweeps import good_sweep, spec
from hostile.texts import corpus, good_tokenizers, tokenizer, tokens, vocabulary

Case = list[str] | Callable[[], int]
Kind = Callable[[Random, Path, Sequence[str]], Case]

KINDS: dict[str, Kind] = {
    f.__name__: f
    for f in (
        *(words, config, corpus, tokens, vocabulary, checkpoint),
        *(tokenizer, spec, compared, shared),
    )
}
# what a kind needs beside the good input of all: made in the working folder
GOOD: dict[str, Callable[[Sequence[str]], None]] = {
    "tokenizer": good_tokenizers,
    "spec": good_sweep,
    "compared": good_comparisons,
    "shared": good_shared,
}
