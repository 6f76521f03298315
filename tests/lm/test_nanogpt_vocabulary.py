"""nanoGPT's pickled vocabulary is read as plain values: no pickle runs anything or fills memory."""

from __future__ import annotations

import builtins
import copyreg
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import DataError
from altprop.lm.text.reading import read_characters
from refusals import one_line


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
