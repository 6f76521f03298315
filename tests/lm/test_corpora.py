"""Reading texts that others wrote: files and folders, and what is said of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import DataError
from altprop.lm.text import describe, load_corpus
from lm_runs import sentences
from refusals import one_line

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = sentences(8)


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


def test_tiny_shakespeare_has_its_published_sizes() -> None:
    default = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    path = Path(os.environ.get("ALTPROP_TINYSHAKESPEARE", default))
    if not path.is_file():
        pytest.skip("set ALTPROP_TINYSHAKESPEARE to the path of tinyshakespeare.txt")
    corpus = load_corpus(path)
    assert len(corpus.tokenizer) == 65
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    whole = corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.validation]))
    assert hashlib.md5(whole.encode()).hexdigest() == "6fb458f1232090904fb40fe944165e91"


def test_a_description_identifies_the_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SAMPLE)
    corpus = load_corpus(tmp_path / "a.txt")
    facts = describe(corpus)
    assert facts["train_sha256"] == hashlib.sha256(corpus.train.astype("<u2").tobytes()).hexdigest()
    assert facts["train"] + facts["validation"] == len(SAMPLE)
    assert facts["vocabulary"] == len(facts["characters"]) == len(set(SAMPLE))
    assert SAMPLE.startswith(facts["head"]) and json.dumps(facts)
