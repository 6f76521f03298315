"""Prepared folders, altprop's and nanoGPT's: read as their text, written whole or not at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from altprop.errors import DataError
from altprop.lm.text import Batches, CharTokenizer, describe, load_corpus, prepare
from altprop.lm.text.token_file import TokenFile
from lm_runs import sentences
from refusals import one_line

SAMPLE = sentences(8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text(SAMPLE, encoding="utf-8")
    return path


def test_a_prepared_folder_loads_like_its_text_and_stays_in_its_files(
    source: Path, tmp_path: Path
) -> None:
    assert prepare(source, tmp_path / "new" / "out") == tmp_path / "new" / "out"
    direct, prepared = load_corpus(source), load_corpus(tmp_path / "new" / "out")
    for split in ("train", "validation"):
        ids = getattr(prepared, split)
        assert isinstance(ids, TokenFile) and ids.dtype == np.uint16
        assert np.array_equal(ids, getattr(direct, split))
    assert prepared.tokenizer == direct.tokenizer
    facts, expected = describe(prepared), describe(direct)
    assert {k: v for k, v in facts.items() if k not in ("name", "description")} == {
        k: v for k, v in expected.items() if k not in ("name", "description")
    }
    x, y = Batches(prepared.train, 2, 8, torch.Generator().manual_seed(0)).draw()
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert sorted(os.listdir(tmp_path / "new")) == ["out"]


def test_nanogpt_can_read_a_prepared_folder(source: Path, tmp_path: Path) -> None:
    out = prepare(source, tmp_path / "out")
    with open(out / "meta.pkl", "rb") as file:
        meta = pickle.load(file)
    ids = np.memmap(out / "train.bin", dtype=np.uint16, mode="r")
    assert "".join(meta["itos"][i] for i in ids.tolist()) == SAMPLE[: int(len(SAMPLE) * 0.9)]
    assert [meta["stoi"][c] for c in sorted(set(SAMPLE))] == list(range(meta["vocab_size"]))


def nanogpt_folder(folder: Path, **changes: Any) -> Path:
    """Write what nanoGPT's prepare.py for characters writes; `changes` replace entries of meta."""
    folder.mkdir(exist_ok=True)
    chars = sorted(set(SAMPLE))
    stoi = {c: i for i, c in enumerate(chars)}
    ids = np.array([stoi[c] for c in SAMPLE], dtype=np.uint16)
    ids[:150].tofile(folder / "train.bin")
    ids[150:].tofile(folder / "val.bin")
    itos = dict(enumerate(chars))
    meta = {"vocab_size": len(chars), "itos": itos, "stoi": stoi, **changes}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_folder_of_nanogpt_is_read_in_every_pickle_protocol(
    tmp_path: Path, protocol: int
) -> None:
    folder = nanogpt_folder(tmp_path / "shakespeare_char")
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    meta.update(note={"ünï", 2.5, (None, True), frozenset()} if protocol > 3 else [2.5, (None,)])
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    corpus = load_corpus(folder)
    assert corpus.tokenizer.decode(corpus.train) == SAMPLE[:150]
    assert corpus.tokenizer.decode(corpus.validation) == SAMPLE[150:]
    assert corpus.name == "shakespeare_char"


def test_a_vocabulary_of_nanogpt_may_be_a_list_in_any_order(tmp_path: Path) -> None:
    chars = sorted(set(SAMPLE), reverse=True)
    stoi = {c: i for i, c in enumerate(chars)}
    folder = nanogpt_folder(tmp_path / "n", itos=chars, stoi=stoi)
    assert load_corpus(folder).tokenizer.vocab == tuple(chars)


def break_vocabulary(folder: Path) -> None:
    (folder / "vocab.json").write_text("{")


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        (lambda f: (f / "train.bin").write_bytes(b"abc"), "train.bin has 3 bytes"),
        (lambda f: (f / "val.bin").write_bytes(b""), "val.bin has 0 bytes"),
        (lambda f: (f / "val.bin").unlink(), r"cannot read .*val\.bin"),
        (lambda f: (f / "train.bin").unlink(), r"cannot read .*train\.bin"),
        (lambda f: (f / "val.bin").write_bytes(b"\0\0\xff\xff"), "holds the id 65535"),
        (lambda f: (f / "meta.pkl").unlink(), "neither vocab.json nor meta.pkl"),
        (break_vocabulary, r"vocab\.json is damaged"),
    ],
)
def test_a_broken_prepared_folder_is_refused(tmp_path: Path, breakage: Any, expected: str) -> None:
    folder = nanogpt_folder(tmp_path / "n")
    breakage(folder)
    with pytest.raises(DataError, match=expected) as error:
        load_corpus(folder)
    one_line(error)


def test_a_foreign_id_is_found_in_any_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = nanogpt_folder(tmp_path / "n")
    ids = np.fromfile(folder / "train.bin", dtype=np.uint16)
    ids[-1] = len(set(SAMPLE))
    ids.tofile(folder / "train.bin")
    monkeypatch.setattr("altprop.lm.text.token_file.CHUNK", 7)
    with pytest.raises(DataError, match=f"holds the id {len(set(SAMPLE))}, but"):
        load_corpus(folder)


def test_a_folder_that_holds_anything_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        prepare(source, out)
    with pytest.raises(DataError, match=r"holds 'diary\.txt', which no prepared folder does"):
        prepare(source, out, overwrite=True)
    with pytest.raises(DataError, match="is a file or a link"):
        prepare(source, out / "diary.txt", overwrite=True)
    assert os.listdir(out) == ["diary.txt"] and sorted(os.listdir(tmp_path)) == ["out", source.name]


def test_overwriting_replaces_a_prepared_folder_and_only_when_asked(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prepare(source, out)  # an empty folder is taken
    source.write_text("abcdefghij" * 3)
    with pytest.raises(DataError, match=r"not empty: .*overwrite"):
        prepare(source, out)
    assert len(load_corpus(out).tokenizer) == len(set(SAMPLE))
    prepare(source, out, overwrite=True)
    assert load_corpus(out).tokenizer.vocab == tuple("abcdefghij")
    prepare(out, out, overwrite=True)  # its own source, mapped while it is replaced
    assert load_corpus(out).tokenizer.decode(load_corpus(out).train) == "abcdefghij" * 2 + "abcdefg"
    assert sorted(os.listdir(tmp_path)) == ["out", source.name]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", ["to_json", "rename"])
def test_a_failure_leaves_nothing_half_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, failure: str
) -> None:
    out = tmp_path / "out"
    if existing:
        prepare(source, out)
        source.write_text("abcdefghij" * 3)
    rename = Path.rename

    def full(self: Any, path: Any) -> Any:
        if failure == "rename" and not str(self).endswith(".partial"):
            return rename(self, path)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CharTokenizer if failure == "to_json" else Path, failure, full)
        with pytest.raises(DataError, match="cannot write .*out: No space left on device"):
            prepare(source, out, overwrite=existing)
    assert sorted(os.listdir(tmp_path)) == (["out"] if existing else []) + [source.name]
    if existing:
        assert len(load_corpus(out).tokenizer) == len(set(SAMPLE))


def test_a_bad_corpus_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(tmp_path / "a.txt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_vocabulary_beyond_uint16_is_prepared_in_32_bits(tmp_path: Path) -> None:
    characters = "".join(map(chr, [*range(1, 13), *range(14, 0xD800), *range(0xE000, 0x12900)]))
    (tmp_path / "a.txt").write_text(characters, encoding="utf-8", newline="")
    direct = load_corpus(tmp_path / "a.txt")
    prepared = load_corpus(prepare(tmp_path / "a.txt", tmp_path / "out"))
    assert direct.train.dtype == prepared.train.dtype == np.uint32
    assert direct.train.max() > 65535 and np.array_equal(direct.train, prepared.train)
    assert describe(direct)["train_sha256"] == describe(prepared)["train_sha256"]
