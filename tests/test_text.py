"""The character tokenizer, corpora of ids, prepared folders and batches."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import AltpropError, CheckpointError, ConfigError, DataError
from altprop.lm.text import (
    Batches,
    CharTokenizer,
    check_context,
    describe,
    load_corpus,
    prepare,
    windows,
)
from altprop.lm.text.token_file import TokenFile

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "To be, or not to be: that is the question.\n" * 5
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def one_line(error: pytest.ExceptionInfo[AltpropError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------- tokenizer


@given(texts)
def test_decoding_inverts_encoding(sample: str) -> None:
    tokenizer = CharTokenizer.from_text(sample)
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample
    assert tokenizer.decode(ids.tolist()) == sample
    assert tokenizer.decode(torch.from_numpy(ids.astype(np.int64))) == sample
    assert ids.dtype == np.uint16


@given(texts)
def test_the_vocabulary_is_the_sorted_distinct_characters(sample: str) -> None:
    tokenizer = CharTokenizer.from_text(sample)
    assert list(tokenizer.vocab) == sorted(set(sample))
    assert len(tokenizer) == len(set(sample))


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
    tokenizer = CharTokenizer.from_text(SAMPLE)
    whole = tokenizer.encode(SAMPLE)
    monkeypatch.setattr("altprop.lm.text.tokenizer.CHUNK", 7)
    assert np.array_equal(tokenizer.encode(SAMPLE), whole)


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
    "content",
    [
        b"",
        b'{"format": "altprop-characters-1", "charac',
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b'{"characters": ["a"]}',
        b'{"format": "other", "characters": ["a"]}',
        b'{"format": "altprop-characters-1", "characters": "ab"}',
    ],
)
def test_a_damaged_vocabulary_file_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vocab.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vocab\.json") as error:
        CharTokenizer.from_json(tmp_path / "vocab.json")
    one_line(error)


def test_a_missing_vocabulary_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        CharTokenizer.from_json(tmp_path / "vocab.json")


def test_a_vocabulary_file_with_bad_characters_is_a_data_error(tmp_path: Path) -> None:
    content = {"format": "altprop-characters-1", "characters": ["a", 7]}
    (tmp_path / "vocab.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="entry 1"):
        CharTokenizer.from_json(tmp_path / "vocab.json")


# ---------------------------------------------------------------------------------------- contexts


def test_a_context_longer_than_a_split_is_refused_with_both_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    corpus = load_corpus(tmp_path / "a.txt")
    check_context(corpus, 9)
    with pytest.raises(DataError, match="validation split of a.txt holds 10 .* of 10 needs 11"):
        check_context(corpus, 10)
    with pytest.raises(DataError, match="train split of a.txt holds 90 .* of 90 needs 91"):
        check_context(corpus, 90)
    with pytest.raises(ConfigError, match="context=0"):
        check_context(corpus, 0)


# ----------------------------------------------------------------------------------------- batches


def tokens(length: int = 200) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.arange(length, dtype=np.uint16)


def test_targets_are_inputs_one_position_on() -> None:
    batches = Batches(tokens(), 4, 8, torch.Generator().manual_seed(0))
    x, y = batches.draw()
    assert x.shape == y.shape == (4, 8) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))


def test_batches_are_those_of_their_seed() -> None:
    first, again, other = (
        Batches(tokens(), 4, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    for _ in range(3):
        x, y = first.draw()
        same, _ = again.draw()
        assert torch.equal(x, same) and not torch.equal(x, other.draw()[0])


def test_batches_go_on_from_the_state_of_their_generator() -> None:
    batches = Batches(tokens(), 4, 8, torch.Generator().manual_seed(3))
    batches.draw()
    state = batches.generator.get_state()
    expected = [x for x, _ in (batches.draw(), batches.draw())]
    generator = torch.Generator()
    generator.set_state(state)
    resumed = Batches(tokens(), 4, 8, generator)
    assert all(torch.equal(resumed.draw()[0], x) for x in expected)


def test_batches_reach_the_first_and_the_last_window_and_no_further() -> None:
    x, y = Batches(tokens(12), 500, 8, torch.Generator().manual_seed(0)).draw()
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3} and int(y.max()) == 11
    x, y = Batches(tokens(9), 3, 8, torch.Generator()).draw()
    assert torch.equal(x, torch.arange(8).expand(3, 8)) and int(y.max()) == 8


def test_impossible_batches_are_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(DataError, match="holds 8 tokens, but a context of 8 needs 9"):
        Batches(tokens(8), 1, 8, generator)
    with pytest.raises(ConfigError, match="batch=0"):
        Batches(tokens(), 0, 8, generator)
    with pytest.raises(ConfigError, match="context=0"):
        Batches(tokens(), 1, 0, generator)
    with pytest.raises(DataError, match="needs 9"):
        windows(tokens(8), 1, 8, 0)
    with pytest.raises(ConfigError, match="count=0"):
        windows(tokens(), 0, 8, 0)


def test_evaluation_windows_are_fixed_and_cover_the_text() -> None:
    x, y = windows(tokens(), 16, 8, seed=5)
    assert x.shape == (16, 8) and torch.equal(y, x + 1)
    assert torch.equal(x, windows(tokens(), 16, 8, seed=5)[0])
    assert not torch.equal(x, windows(tokens(), 16, 8, seed=6)[0])
    starts = x[:, 0].double()
    stretch = (200 - 8) / 16
    assert torch.equal((starts / stretch).floor(), torch.arange(16).double())


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=50)
def test_evaluation_windows_stay_inside_the_text(length: int, count: int, seed: int) -> None:
    x, y = windows(tokens(length), count, 1, seed)
    assert torch.equal(y, x + 1) and int(x.min()) >= 0 and int(y.max()) < length


# --------------------------------------------------------------------------------- prepared folders


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


# ---------------------------------------------------------------------------------- whole corpora


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


def test_a_description_identifies_the_ids(source: Path) -> None:
    corpus = load_corpus(source)
    facts = describe(corpus)
    assert facts["train_sha256"] == hashlib.sha256(corpus.train.astype("<u2").tobytes()).hexdigest()
    assert facts["train"] + facts["validation"] == len(SAMPLE)
    assert facts["vocabulary"] == len(facts["characters"]) == len(set(SAMPLE))
    assert SAMPLE.startswith(facts["head"]) and json.dumps(facts)
