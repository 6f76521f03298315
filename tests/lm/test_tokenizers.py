"""Tokens longer than a character: they lose nothing, mean one thing, and are kept with the text."""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import DataError
from altprop.lm.text import (
    CharTokenizer,
    IdTokenizer,
    SubwordTokenizer,
    describe,
    load_corpus,
    prepare,
    read_tokenizer,
    train_bpe,
)
from altprop.lm.text import subword as subword_module
from altprop.lm.text.token_file import TokenFile
from lm_runs import sentences, tree

pytest.importorskip("tokenizers", reason="tokenizers of subwords need the extra hf")
BPE = train_bpe(sentences(), 300)
BLANK_LINES = sentences().replace(".\n", ".\n\n\n")
WITH_BLANKS = train_bpe(BLANK_LINES, 300)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_byte_level_bpe_loses_nothing_of_any_text_whole_or_as_it_comes(
    text: str, piece: int
) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text == "".join(BPE.pieces(ids.tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subword_module, "PIECE", piece)
        assert BPE.decode(BPE.encode(text)) == text


@given(st.integers(0, 5000), st.integers(60, 500))
@settings(max_examples=20, deadline=None)
def test_a_text_is_encoded_in_pieces_as_it_is_whole(start: int, piece: int) -> None:
    text = BLANK_LINES[start:]
    whole = WITH_BLANKS.encode(text)
    assert any("\n\n" in WITH_BLANKS.decode([index]) for index in set(whole.tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subword_module, "PIECE", piece)
        assert np.array_equal(WITH_BLANKS.encode(text), whole)


def test_a_bpe_is_that_of_its_text_and_shortens_it() -> None:
    text = sentences()
    again = train_bpe(text, 300)
    assert again == BPE and again.digest() == BPE.digest() != train_bpe(text, 299).digest()
    ids = BPE.encode(text)
    assert ids.dtype == np.uint16 and len(BPE) == 300 == ids.max() + 1
    assert len(ids) < len(text) / 3
    few = train_bpe("ab", 5000)  # a short text has no more to give
    assert len(few) == 257 and few.decode(few.encode("ab ☃")) == "ab ☃"


def test_what_is_part_of_a_character_waits_for_its_rest_and_is_not_lost() -> None:
    ids = BPE.encode("a☃b").tolist()
    assert [*BPE.pieces(ids)] == ["a", "☃", "b"]
    assert "".join(BPE.pieces(ids[:-2])) == BPE.decode(ids[:-2]) == "a�"


def test_a_tokenizer_is_its_file_and_no_special_token_comes_into_a_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_str(BPE.text)
    library.add_special_tokens(["<s>"])
    mark = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", mark)]
    )
    library.enable_truncation(4)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    read = SubwordTokenizer.from_json(tmp_path / "tokenizer.json")
    text = sentences(3)
    assert len(read) == len(BPE) + 1 and np.array_equal(read.encode(text), BPE.encode(text))
    assert read.decode([mark, *BPE.encode("the")]) == "<s>the"
    read.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert (
        load_corpus(_text(tmp_path), tokenizer=str(tmp_path)).tokenizer
        == load_corpus(_text(tmp_path), tokenizer=str(tmp_path / "again.json")).tokenizer
    )


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////fwAAAAA="}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ],
)
def test_a_panic_of_the_library_is_one_error_and_is_not_heard(
    part: str, value: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps({**json.loads(BPE.text), part: value})
    with pytest.raises(DataError, match="the library tokenizers can read|cannot encode the text"):
        SubwordTokenizer(text).encode("the cat")
    assert capfd.readouterr().err == ""
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_a_tokenizer_that_knows_nothing_of_a_text_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    import tokenizers

    model = tokenizers.models.BPE({"☃": 0}, [])
    tokenizers.Tokenizer(model).save(str(tmp_path / "snow.json"))
    path = _text(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(DataError, match="makes no tokens of the text to train on, text.txt: give"):
        prepare(path, tmp_path / "out", tokenizer=str(tmp_path / "snow.json"))
    assert tree(tmp_path) == before


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(sentences(), encoding="utf-8")
    return path


def test_a_bpe_is_learned_from_the_text_to_train_on_alone(tmp_path: Path) -> None:
    path, held = _text(tmp_path), tmp_path / "held.txt"
    held.write_text("☃ zebras quarrel " * 50, encoding="utf-8")
    corpus = load_corpus(path, validation=held, tokenizer="bpe:300")
    assert corpus.tokenizer == BPE
    assert corpus.tokenizer.decode(corpus.train) == sentences()
    assert corpus.tokenizer.decode(corpus.validation) == held.read_text()
    assert describe(corpus)["vocabulary"] == 300


def test_a_prepared_folder_keeps_its_tokenizer(tmp_path: Path) -> None:
    direct = load_corpus(_text(tmp_path), tokenizer="bpe:300")
    out = prepare(_text(tmp_path), tmp_path / "out", tokenizer="bpe:300")
    assert sorted(tree(out)) == ["digest.json", "tokenizer.json", "train.bin", "val.bin"]
    for stated in (None, str(out), str(out / "tokenizer.json")):
        prepared = load_corpus(out, tokenizer=stated)
        assert prepared.tokenizer == direct.tokenizer == read_tokenizer(out)
        assert np.array_equal(prepared.train, direct.train)
    for stated, said in [
        ("char", "holds tokens"),
        ("bpe:300", "holds tokens"),
        ("ids:300", "holds another tokenizer than ids:300"),
    ]:
        with pytest.raises(DataError, match=said):
            load_corpus(out, tokenizer=stated)
    with pytest.raises(DataError, match="leave out validation, pattern"):
        load_corpus(out, validation=tmp_path / "text.txt")


def nanogpt(folder: Path, vocabulary: int, dtype: Any = np.uint16) -> np.ndarray[Any, Any]:
    """Write a folder as nanoGPT's prepare.py of OpenWebText does: tokens and no word of them."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, vocabulary, 200).astype(dtype)
    ids[-1] = vocabulary - 1
    ids[:150].tofile(folder / "train.bin")
    ids[150:].tofile(folder / "val.bin")
    return ids


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(300, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_tokens_of_a_stated_vocabulary_are_read_in_its_width(
    vocabulary: int, dtype: Any, tmp_path: Path
) -> None:
    ids = nanogpt(tmp_path / "n", vocabulary, dtype)
    with pytest.raises(DataError, match="state it by --tokenizer path/tokenizer.json, or"):
        load_corpus(tmp_path / "n")
    corpus = load_corpus(tmp_path / "n", tokenizer=f"ids:{vocabulary}")
    assert isinstance(corpus.train, TokenFile) and corpus.train.dtype == dtype
    assert np.array_equal(np.concatenate([corpus.train, corpus.validation]), ids)
    text = corpus.tokenizer.decode(ids)
    assert text == " ".join(map(str, ids)) and np.array_equal(corpus.tokenizer.encode(text), ids)
    assert "".join(corpus.tokenizer.pieces(ids.tolist())).rstrip() == text
    if dtype is np.uint16:  # past which a number less is another width
        with pytest.raises(DataError, match=f"its vocabulary has {vocabulary - 1} entries"):
            load_corpus(tmp_path / "n", tokenizer=f"ids:{vocabulary - 1}")
    again = load_corpus(prepare(tmp_path / "n", tmp_path / "out", tokenizer=f"ids:{vocabulary}"))
    assert again.tokenizer == IdTokenizer(vocabulary) and again.train.dtype == dtype
    assert (tmp_path / "out" / "train.bin").read_bytes() == ids[:150].tobytes()


def test_a_stated_tokenizer_says_what_tokens_mean_and_nothing_is_unpickled(tmp_path: Path) -> None:
    ids = nanogpt(tmp_path / "n", 300)
    BPE.to_json(tmp_path / "tokenizer.json")
    (tmp_path / "n" / "meta.pkl").write_bytes(pickle.dumps(print))
    corpus = load_corpus(tmp_path / "n", tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.tokenizer.decode(corpus.train) == BPE.decode(ids[:150])
    with pytest.raises(DataError, match=r"meta\.pkl is refused, it names"):
        load_corpus(tmp_path / "n")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("bpe", "tokenizer 'bpe' is none: expected char, bpe:4096, the path"),
        ("bpe:many", "tokenizer 'bpe:many' is none"),
        ("bpe:255", "expected at least 256 tokens"),
        ("bpe:99999999999", "is none"),
        ("ids:50257", "is for a folder of train.bin and val.bin alone"),
        ("ids:", "tokenizer 'ids:' is none|is for a folder"),
        ("no/such.json", "no tokenizer 'no/such.json': expected char"),
        ("", "no tokenizer|cannot read"),
    ],
)
def test_what_is_no_tokenizer_is_refused(spec: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as error:
        load_corpus(_text(tmp_path), tokenizer=spec)
    assert "\n" not in str(error.value)


EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
FOREIGN = {**EMPTY, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}
WORDS = {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "#"}
NO_UNKNOWN = {**EMPTY, "model": {**WORDS, "max_input_chars_per_word": 9, "vocab": {"a": 0}}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "damaged or not JSON"),
        (b"\xff\xfe", "damaged or not JSON"),
        ("[" * 40 + "]" * 40, "damaged or not JSON"),
        ("{}", "no tokenizer that the library tokenizers can read"),
        ("[]", "no tokenizer that the library tokenizers can read"),
        (json.dumps(EMPTY), "vocabulary is empty"),
        (json.dumps(FOREIGN), "no tokenizer that the library"),
        (json.dumps(NO_UNKNOWN), "cannot encode the text"),
        (BPE.text.replace('"!":0', '"!":4000000000'), "has the id 4000000000"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(
    content: str | bytes, said: str, tmp_path: Path
) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(DataError, match=said) as error:
        load_corpus(_text(tmp_path), tokenizer=str(tmp_path / "t.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nested", [False, True])
def test_a_table_that_states_more_than_it_has_is_refused_before_it_is_asked_for(
    nested: bool, tmp_path: Path
) -> None:
    """The library would ask for as many bytes, and abort the process where it gets none."""
    read = json.loads(BPE.text)
    stated = (1 << 32) - 1
    table = base64.b64encode(stated.to_bytes(4, "little") + bytes(4)).decode("ascii")
    read["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
    if nested:
        read["normalizer"] = {"type": "Sequence", "normalizers": [read["normalizer"]]}
    (path := tmp_path / "tokenizer.json").write_text(json.dumps(read), encoding="utf-8")
    with pytest.raises(DataError, match=f"{path}: .* states {stated} bytes and has 4$"):
        SubwordTokenizer.from_json(path)


def test_a_text_of_half_a_character_is_refused() -> None:
    with pytest.raises(DataError, match="cannot encode the text"):
        BPE.encode("a\ud800")
    with pytest.raises(DataError, match="no row of ids"):
        IdTokenizer(3).encode("1 two")


def test_without_the_library_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r'pip install "altprop\[hf\]"') as error:
        load_corpus(_text(tmp_path), tokenizer="bpe:300")
    assert "\n" not in str(error.value)
    assert type(load_corpus(_text(tmp_path)).tokenizer) is CharTokenizer  # which needs none
