"""The tokenizer of characters: ids and back, its vocabulary, and the file that keeps it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import AltpropError, CheckpointError, DataError
from altprop.lm.text import CharTokenizer
from lm_runs import sentences
from refusals import one_line

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(texts)
def test_decoding_inverts_encoding_by_the_sorted_distinct_characters(sample: str) -> None:
    tokenizer = CharTokenizer.from_text(sample)
    assert list(tokenizer.vocab) == sorted(set(sample)) and len(tokenizer) == len(set(sample))
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample
    assert tokenizer.decode(ids.tolist()) == sample
    assert tokenizer.decode(torch.from_numpy(ids.astype(np.int64))) == sample
    assert ids.dtype == np.uint16


@given(texts)
@settings(max_examples=50)
def test_a_vocabulary_survives_json(tmp_path_factory: pytest.TempPathFactory, sample: str) -> None:
    path = tmp_path_factory.getbasetemp() / "vocab.json"
    tokenizer = CharTokenizer.from_text(sample)
    tokenizer.to_json(path)
    assert CharTokenizer.from_json(path) == tokenizer


def test_a_vocabulary_file_shows_its_characters(tmp_path: Path) -> None:
    CharTokenizer.from_text("aé\n").to_json(tmp_path / "v.json")
    lines = (tmp_path / "v.json").read_text(encoding="utf-8").split("\n")
    assert ' "size": 3,' in lines and '  "é"' in lines


def test_encoding_in_pieces_is_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CharTokenizer.from_text(text := sentences(8))
    whole = tokenizer.encode(text)
    monkeypatch.setattr("altprop.lm.text.tokenizer.CHUNK", 7)
    assert np.array_equal(tokenizer.encode(text), whole)


def test_more_than_65535_characters_take_uint32() -> None:
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x12000)]))
    assert CharTokenizer.from_text(characters[:65535]).encode("a").dtype == np.uint16
    tokenizer = CharTokenizer.from_text(characters)
    ids = tokenizer.encode(characters[-3:])
    assert ids.dtype == np.uint32 and ids.tolist() == [len(tokenizer) - 3 + k for k in range(3)]


def test_the_empty_text_encodes_to_no_ids() -> None:
    tokenizer = CharTokenizer.from_text("ab")
    assert tokenizer.encode("").tolist() == [] and tokenizer.decode([]) == ""


def test_unknown_characters_are_named_and_counted() -> None:
    tokenizer = CharTokenizer.from_text("ab")
    with pytest.raises(DataError) as error:
        tokenizer.encode("abc\n\U0001f600")
    message = one_line(error)
    assert all(repr(c) in message for c in "c\n\U0001f600") and "vocabulary of 2" in message
    with pytest.raises(DataError, match=r"'l' and 2 more: remove or replace them") as error:
        tokenizer.encode("abcdefghijklmn")
    assert "'m'" not in one_line(error)


@pytest.mark.parametrize(
    "ids", [[2], [-1], [0.5], [[0, 1]], np.array([70000]), ["a"], [10**30], [True]]
)
def test_foreign_ids_are_refused(ids: Any) -> None:
    with pytest.raises(DataError, match="cannot decode"):
        CharTokenizer.from_text("ab").decode(ids)


@pytest.mark.parametrize("vocab", [(), ("a", "a"), ("ab",), ("",), (1,), ("\ud800",)])
def test_a_vocabulary_holds_distinct_single_characters(vocab: tuple[Any, ...]) -> None:
    with pytest.raises(DataError, match="vocabulary"):
        CharTokenizer(vocab)


def test_a_tokenizer_cannot_be_changed_and_pickles() -> None:
    tokenizer = CharTokenizer.from_text("ab")
    with pytest.raises(AttributeError):
        tokenizer.vocab = ("c",)  # type: ignore[misc]
    tokenizer.encode("a")
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    assert hash(tokenizer) == hash(CharTokenizer(("a", "b")))


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, CheckpointError, r"cannot read .*vocab\.json"),
        *(
            (content, CheckpointError, r"vocab\.json (is damaged|is not a vocabulary|has no list)")
            for content in (
                b"",
                b'{"format": "altprop-characters-1", "charac',
                b"\xff\xfe",
                b"[" * 100_000,
                b"[]",
                b'{"characters": ["a"]}',
                b'{"format": "altprop-characters-1"}',
                b'{"format": "other", "characters": ["a"]}',
                b'{"format": "altprop-characters-1", "characters": "ab"}',
            )
        ),
        (b'{"format": "altprop-characters-1", "characters": ["a", 7]}', DataError, "entry 1"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_vocabulary_file_that_is_none_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, error: type[AltpropError], said: str
) -> None:
    if content is not None:
        (tmp_path / "vocab.json").write_bytes(content)
    with pytest.raises(error, match=said) as caught:
        CharTokenizer.from_json(tmp_path / "vocab.json")
    one_line(caught)
