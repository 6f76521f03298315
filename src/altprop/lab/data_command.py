"""The command `altprop data`: shows the corpora, or writes one as a folder to train from."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from altprop.errors import ConfigError
from altprop.lm.text import Corpus, describe, list_corpora, load_corpus, prepare
from altprop.terminal import printable


def data(corpus: str | None = None, *, out: Path | None = None, overwrite: bool = False) -> None:
    """List the corpora, describe one, or encode it once into a folder of tokens.

    Args:
        corpus: Name of a corpus, a UTF-8 text file, a folder of text files, or a folder in
            nanoGPT's layout. Without it, the corpora that have a name are listed.
        out: Folder to write: train.bin, val.bin, vocab.json and nanoGPT's meta.pkl.
        overwrite: Replace a folder that an earlier `--out` wrote.
    """
    console = Console()
    if overwrite and out is None:
        raise ConfigError("--overwrite needs --out: altprop data CORPUS --out DIR --overwrite")
    if corpus is None:
        if out is not None:
            raise ConfigError("--out needs a corpus to encode: altprop data CORPUS --out DIR")
        console.print(_corpora_table())
        return
    if out is None:
        console.print(_corpus_table(load_corpus(corpus)))
        return
    console.print(_corpus_table(load_corpus(prepare(corpus, out, overwrite=overwrite))))


def _corpora_table() -> Table:
    table = Table("corpus", "text", "status", title="Corpora")
    for info in list_corpora():
        status = "ready" if info.available else info.install
        table.add_row(info.name, info.description, Text(status))  # whose [extra] is no markup
    table.add_row("PATH", "a UTF-8 text file, a folder of *.txt and *.md files", "")
    table.add_row("PATH", "a folder in nanoGPT's layout, as written by --out", "")
    return table


def _corpus_table(corpus: Corpus) -> Table:
    facts = describe(corpus)
    rows = {
        "corpus": facts["name"],
        "source": facts["description"],
        "train": f"{facts['train']:,} characters",
        "validation": f"{facts['validation']:,} characters",
        "vocabulary": f"{facts['vocabulary']} characters: {facts['characters'][:200]!r}",
        "train sha256": facts["train_sha256"],
        "validation sha256": facts["validation_sha256"],
        "starts": facts["head"],
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        # as Text the brackets of a foreign text are no markup
        table.add_row(name, Text(printable(value, keep="\n")))
    return table
