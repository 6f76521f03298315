"""Text as a language model sees it: corpora by name or path, their characters, windows of them."""

from altprop.lm.text.batches import Batches, gather, windows
from altprop.lm.text.corpus import Corpus, check_context, describe
from altprop.lm.text.sources import CorpusInfo, list_corpora, load_corpus, names_corpus, prepare
from altprop.lm.text.tokenizer import CharTokenizer, Ids

__all__ = [
    "Batches",
    "CharTokenizer",
    "Corpus",
    "CorpusInfo",
    "Ids",
    "check_context",
    "describe",
    "gather",
    "list_corpora",
    "load_corpus",
    "names_corpus",
    "prepare",
    "windows",
]
