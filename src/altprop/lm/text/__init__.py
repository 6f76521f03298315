"""Text as a language model sees it: corpora by name or path, their tokens, windows of them."""

from altprop.lm.text.batches import Batches, gather, windows
from altprop.lm.text.choice import FILES as TOKENIZER_FILES
from altprop.lm.text.choice import names_tokenizer, read_tokenizer
from altprop.lm.text.corpus import Corpus, check_context, check_length, describe
from altprop.lm.text.ids import IdTokenizer
from altprop.lm.text.sources import (
    CorpusInfo,
    absolute,
    is_path,
    list_corpora,
    load_corpus,
    names_corpus,
    prepare,
)
from altprop.lm.text.subword import SubwordTokenizer, train_bpe
from altprop.lm.text.tokenizer import AbstractTokenizer, CharTokenizer, Ids

__all__ = [
    "AbstractTokenizer",
    "Batches",
    "CharTokenizer",
    "Corpus",
    "CorpusInfo",
    "IdTokenizer",
    "Ids",
    "SubwordTokenizer",
    "TOKENIZER_FILES",
    "absolute",
    "check_context",
    "check_length",
    "describe",
    "gather",
    "is_path",
    "list_corpora",
    "load_corpus",
    "names_corpus",
    "names_tokenizer",
    "prepare",
    "read_tokenizer",
    "train_bpe",
    "windows",
]
