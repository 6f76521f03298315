"""The command `altprop data`: shows the corpora, or writes one as a folder to train from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from altprop.errors import ConfigError
from altprop.lm.text import Corpus, describe, list_corpora, load_corpus, prepare
from altprop.terminal import printable

SHOWN = 4000  # characters of a text's start
SEEN = 1 << 20  # tokens of the validation part whose length is taken


def data(
    corpus: str | None = None,
    *,
    validation: str | None = None,
    pattern: tuple[str, ...] = (),
    tokenizer: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """List the corpora, describe one, or encode it once into a folder of tokens.

    Args:
        corpus: Name of a corpus, a UTF-8 text file, a folder of text files, a Hugging Face dataset
            (`hf:NAME[:config][:column]`), or a folder in nanoGPT's layout. Without it, the corpora
            that have a name are listed.
        validation: A text to validate on, instead of the corpus's last tenth or its own split.
        pattern: Which files of a folder are its texts, such as `*.py`.
        tokenizer: `char`, `bpe:4096`, the path of a tokenizer.json, or `ids:50257`, as of train.
        out: Folder to write: train.bin, val.bin, and vocab.json with nanoGPT's meta.pkl, or
            tokenizer.json.
        overwrite: Replace a folder that an earlier `--out` wrote.
    """
    console = Console()
    if overwrite and out is None:
        raise ConfigError("--overwrite needs --out: altprop data CORPUS --out DIR --overwrite")
    how: dict[str, Any] = {"validation": validation, "pattern": pattern, "tokenizer": tokenizer}
    if corpus is None:
        for name, value in {"out": out, **how}.items():
            if value:
                raise ConfigError(f"--{name} needs a corpus: altprop data CORPUS --{name} {value}")
        console.print(_corpora_table())
        return
    if out is None:
        console.print(_corpus_table(load_corpus(corpus, **how)))
        return
    console.print(_corpus_table(load_corpus(prepare(corpus, out, overwrite=overwrite, **how))))


def _corpora_table() -> Table:
    table = Table("corpus", "text", "status", title="Corpora")
    for info in list_corpora():
        status = "ready" if info.available else info.install
        table.add_row(info.name, info.description, Text(status))  # whose [extra] is no markup
    table.add_row("PATH", "a UTF-8 text file, a folder of *.txt and *.md files (or --pattern)", "")
    table.add_row("hf:NAME", "a Hugging Face dataset, by name or path", "")
    table.add_row("PATH", "a folder in nanoGPT's layout, as written by --out", "")
    return table


def _corpus_table(corpus: Corpus) -> Table:
    facts, unit = describe(corpus), corpus.tokenizer.unit
    said = f": {facts['characters'][:200]!r}" if "characters" in facts else ""
    kind = f" of {facts['tokenizer']}" if "tokenizer" in facts else ""
    rows = {
        "corpus": facts["name"],
        "source": facts["description"],
        "train": f"{facts['train']:,} {unit}",
        "validation": f"{facts['validation']:,} {unit}{_length(corpus)}",
        "vocabulary": f"{facts['vocabulary']} {unit}{kind}{said}",
        "train sha256": facts["train_sha256"],
        "validation sha256": facts["validation_sha256"],
        "starts": facts["head"][:SHOWN],
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        # as Text the brackets of a foreign text are no markup
        table.add_row(name, Text(printable(value, keep="\n")))
    return table


def _length(corpus: Corpus) -> str:
    """Say how long a token of the text is, by which losses of different tokenizers compare."""
    ids = corpus.validation[:SEEN]
    size = len(corpus.tokenizer.decode(ids))
    return "" if size == len(ids) else f", {size / len(ids):.3f} characters each"
