"""A run's text: read as its configuration says, by the tokenizer that its folder keeps."""

from __future__ import annotations

import os
from pathlib import Path

from altprop.lab.settings import TrainConfig
from altprop.lm.text import (
    TOKENIZER_FILES,
    AbstractTokenizer,
    Corpus,
    SubwordTokenizer,
    load_corpus,
    names_tokenizer,
)
from altprop.reading import place


def corpus_of(config: TrainConfig) -> Corpus:
    """Return the text of a run, tokenised; a resumed run reads it by the tokenizer it has kept.

    **Raises:** `DataError` for a text or tokenizer that cannot be used.
    """
    said = config.tokenizer
    tokenizer: str | AbstractTokenizer | None = said
    if config.resume and config.out is not None and said is not None:
        kept = config.out / SubwordTokenizer.file
        gone = not names_tokenizer(said) and not os.path.exists(place(said))
        if (said.startswith("bpe:") or gone) and kept.is_file():
            tokenizer = SubwordTokenizer.from_json(kept)
    return load_corpus(
        config.data,
        validation=config.validation,
        pattern=config.pattern,
        tokenizer=tokenizer,
    )


def keep(tokenizer: AbstractTokenizer, folder: Path) -> None:
    """Write a run's tokenizer into its folder, in the place of any other."""
    tokenizer.to_json(folder / tokenizer.file)
    for other in set(TOKENIZER_FILES) - {tokenizer.file}:
        (folder / other).unlink(missing_ok=True)
