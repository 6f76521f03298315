"""Files of somebody else are read within bounds, and a terminal obeys nothing that they hold."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from altprop import ConfigError
from altprop.errors import DataError, refusing
from altprop.lab import memory
from altprop.lab.cli import main
from altprop.lab.config import LARGEST, read_values
from altprop.lab.settings import TrainConfig
from altprop.lab.train import begin, steps
from altprop.lm.blocks import ModelConfig
from altprop.lm.model import GPT, EquilibriumLM
from altprop.lm.text import Batches, load_corpus, prepare
from altprop.lm.text.prepared import read_prepared
from altprop.reading import DEEPEST, in_bytes, parse_json, place, read_bytes
from altprop.terminal import printable
from lm_runs import sentences, small, words

# Files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


ODD: list[tuple[Callable[[Path], None], str]] = [
    (fifo, "it is a fifo, expected a regular file"),
    (linked("/dev/zero"), "it is a device, expected a regular file"),
    (linked("/proc/self/mem"), "Input/output error"),
    (linked("odd"), "Too many levels of symbolic links"),
    (Path.mkdir, "Is a directory"),
    (lambda path: path.write_bytes(b"a" * 101) and None, "larger than 100 bytes, the most that"),
]


@pytest.mark.parametrize(("make", "why"), ODD, ids=[why for _, why in ODD])
def test_what_is_no_regular_file_of_that_size_is_an_error_of_that_file(
    make: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    make(path := tmp_path / "odd")
    with pytest.raises(OSError, match=why) as caught:
        read_bytes(path, most=100)
    assert caught.value.filename == str(path)


def test_a_file_of_the_largest_size_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content := os.urandom(100))
    assert read_bytes(tmp_path / "a", most=100) == content
    with pytest.raises(OSError, match="no file has such a name"):
        read_bytes("a\0b", most=100)


@pytest.mark.parametrize("name", ["--config", "--data"])
@pytest.mark.parametrize("path", ["pipe", "/proc/self/mem", "/dev/zero", "~nosuchuser/x", "a\0b"])
def test_a_command_says_so_in_one_line(
    name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    fifo(tmp_path / "pipe")
    assert main(["train", name, path]) == 2
    err = capsys.readouterr().err
    assert path.partition("/")[0].replace("\0", "\\x00") in err and err.count("\n") == 1


def test_a_home_is_expanded_and_what_is_no_name_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert place("~/a") == Path("/home/me/a") and place("./~a") == Path("~a")
    assert place("~nosuchuser/a") == Path("~nosuchuser/a")  # as a shell has it
    for text in ("a\0", "\ud800"):
        with pytest.raises(DataError, match="is no path: it holds"):
            place(text, DataError)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 10, "1 KiB"), (3 << 29, "1.5 GiB"),
     (10**60, "1e41 EiB"), (3 * 10**12, "2.7 TiB")],
)  # fmt: skip
def test_sizes_are_said_in_the_largest_unit(count: int, text: str) -> None:
    assert in_bytes(count) == text


# Nesting


def test_json_nests_no_deeper_than_said() -> None:
    deep = json.loads("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json("[" * DEEPEST + "]" * DEEPEST) == deep
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for count in (DEEPEST + 1, 100_000):
        for opening, closing in (("[", "]"), ('{"a":[', "]}")):
            with pytest.raises(ValueError, match=f"more than {DEEPEST} levels"):
                parse_json(opening * count + closing * count)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "more than 10000 values"),
        ("steps: &a [*a]", "an alias stands inside of what it stands for"),
        ("steps: " + "[" * 40 + "]" * 40, "30 levels in one another"),
        ("".join(f"{n}: &n{n} [*n{n - 1}]\n" if n else "0: &n0 []\n" for n in range(40)), "30 lev"),
        ("steps: " + "1:" * 6000 + "1", "a text of 12001 characters, expected at most 10000"),
        ("#" * (LARGEST + 1), "larger than 256 KiB"),
    ],
    ids=["bomb", "in itself", "deep", "deep by aliases", "long", "large"],
)
def test_yaml_is_bounded_before_it_is_looked_at(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises((ConfigError, OSError), match=why):
        read_values(tmp_path / "a.yaml", TrainConfig)
    assert time.perf_counter() - began < 5


def test_an_alias_within_the_bounds_is_what_it_stands_for(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rules: {a: &r Backprop, b: *r}\nmodel: gpt\n")
    rules = read_values(tmp_path / "a.yaml", TrainConfig)["rules"]
    assert rules["a"] == rules["b"] and list(rules) == ["a", "b"]


# Nothing runs


MARKED = "import pathlib\npathlib.Path('mark').touch()\nfrom altprop import FeedbackAlignment\n"


@pytest.mark.parametrize(
    "line",
    [
        "rule: marked.FeedbackAlignment()",
        "rule: {class_path: marked.FeedbackAlignment}",
        "rule: '__import__(\"marked\")'",
        "rule: !!python/name:marked.FeedbackAlignment",
        "rule: !!python/object/apply:marked.FeedbackAlignment []",
        "import: marked",
        "rules: {a: marked.FeedbackAlignment()}",
    ],
)
def test_no_line_of_a_file_imports_a_module(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("marked.py").write_text(MARKED)
    Path("a.yaml").write_text(f"model: gpt\n{line}\n")
    for command in ("train", "explain"):
        main([command, "--config", "a.yaml", "--print_config"])
    assert not Path("mark").exists() and "marked" not in sys.modules
    assert main(["train", "--import", "marked", "--print_config"]) == 0  # only the command line
    assert Path("mark").exists()
    del sys.modules["marked"]


@pytest.mark.parametrize("code", ["1 / 0", "import sys; sys.exit(7)", "def"])
def test_a_module_that_cannot_be_imported_is_one_line_with_its_place(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    Path("my_broken.py").write_text(f"\n{code}\n")
    assert main(["train", "--import", "my_broken"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("altprop: error: --import my_broken: ") and err.count("\n") == 1
    assert "my_broken.py" in err


# Terminals


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x9b\x7f", "a\\x1b[2J\\x9b\\x7f"),
        ("\u202eevil\u2069\u200f", "\\u202eevil\\u2069\\u200f"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("line\nline\ttab\r", "line\nline\\ttab\\r"),
        ("caf\xe9 \N{ZERO WIDTH JOINER} \N{PILE OF POO} \xa0", None),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str | None) -> None:
    assert printable(text, keep="\n") == (text if shown is None else shown)
    assert printable(printable(text)) == printable(text)


@pytest.mark.usefixtures("no_curves")
def test_what_a_model_writes_is_escaped_but_for_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\x1b[2J\n\u202e" * 200, encoding="utf-8")
    config = small(tmp_path / "\x1b]0;run", steps=1)
    assert main(["train", *words(config), "--sample", "20"]) == 0
    assert main(["sample", str(tmp_path / "\x1b]0;run"), "--tokens", "50"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b" in out and "\n" in out and "\x1b" not in out and "\u202e" not in out


# One line, whatever an input raises


def test_what_an_input_raises_becomes_one_line_that_names_it() -> None:
    for error in (KeyError("x"), RecursionError("a\nb"), ZeroDivisionError()):
        with (
            pytest.raises(ConfigError, match="^a.yaml: ") as caught,
            refusing(ConfigError, "a.yaml"),
        ):
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="^other$"), refusing(ConfigError, "a.yaml"):
        raise OSError("other")


def test_the_line_of_an_error_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", "x" * 50_000]) == 2
    assert len(capsys.readouterr().err) < 1600


# Memory


SHAPES = [
    ModelConfig(60, 32, 32, 2, block, layers, tie, stacking)
    for block, layers, tie, stacking in [
        ("gated", 1, False, "joint"), ("damped", 1, False, "joint"), ("thick", 1, False, "joint"),
        ("gated", 3, False, "joint"), ("thick", 2, False, "separate"), ("gated", 3, True, "joint"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weights_are_counted_before_there_are_any(shape: ModelConfig) -> None:
    for name, model in (("gpt", GPT), ("equilibrium", EquilibriumLM)):
        if name == "equilibrium" and shape.tie_head:
            continue
        real = sum(p.numel() for p in model(shape).parameters())
        assert 0.9 * real < memory.weights(shape, name) <= real


def test_a_size_past_the_memory_is_refused_with_its_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"d_model is 2000000.*: at least 174\.\d TiB of memory"):
        TrainConfig(d_model=2_000_000)
    config = small(tmp_path / "run", batch=10**9)
    with pytest.raises(ConfigError, match=r"batch is 1000000000, .*: at least .* of memory"):
        begin(config, load_corpus(config.data))
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    memory.check_memory(100_000, "it")
    with pytest.raises(ConfigError, match="it: at least 97.6 KiB of memory, but there are 97.6"):
        memory.check_memory(100_001, "it")


def test_memory_that_runs_out_all_the_same_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 b")):
        monkeypatch.setattr("altprop.lab.data_command.list_corpora", lambda e=error: raised(e))
        assert main(["data"]) == 2
        assert capsys.readouterr().err.startswith("altprop: error: not enough memory (")


def raised(error: Exception) -> None:
    raise error


# A run


def test_a_clock_that_stands_still_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", steps=1)
    state, guard = begin(config, load_corpus(config.data))
    still = SimpleNamespace(perf_counter=lambda: 7.0)
    monkeypatch.setattr("altprop.lab.train.time", still)
    (record,) = steps(config, state, guard)
    assert np.isfinite(record["tokens_per_second"])


# Prepared folders


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(sentences(), encoding="utf-8")
    return prepare(tmp_path / "text.txt", tmp_path / "tokens")


def draw(folder: Path, spoil: Callable[[Path], None]) -> None:
    batches = Batches(load_corpus(folder).train, 64, 8, torch.Generator().manual_seed(0))
    batches.draw()
    spoil(folder / "train.bin")
    batches.draw()


def test_a_token_file_that_changes_while_it_is_used_is_one_line(tokens: Path) -> None:
    shutil.copytree(tokens, again := tokens.parent / "again")
    with pytest.raises(DataError, match=r"train\.bin has become shorter since it was opened"):
        draw(tokens, lambda path: os.truncate(path, 100))
    with pytest.raises(DataError, match=r"train\.bin holds the id 65535, but its vocabulary has"):
        draw(again, lambda path: path.write_bytes(b"\xff" * path.stat().st_size))


def test_a_folder_that_is_replaced_while_it_is_used_stays_the_old_one(tokens: Path) -> None:
    old = load_corpus(tokens)
    before = old.tokenizer.decode(old.train)
    (tokens.parent / "text.txt").write_text("new " * 100)
    prepare(tokens.parent / "text.txt", tokens, overwrite=True)
    assert old.tokenizer.decode(old.train) == before
    assert set(load_corpus(tokens).tokenizer.vocab) == set("new ")


def test_a_folder_that_is_replaced_while_it_is_opened_is_the_new_one(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tokens.parent / "text.txt").write_text("new " * 100)
    prepare(tokens.parent / "text.txt", tokens.parent / "fresh")
    listed = os.listdir
    folders = chain([tokens], repeat(None))

    def replaced(opened: int) -> list[str]:
        names = listed(opened)
        if folder := next(folders):
            shutil.rmtree(folder)
            (tokens.parent / "fresh").rename(folder)
        return names

    monkeypatch.setattr("altprop.lm.text.prepared.os.listdir", replaced)
    assert set(read_prepared(tokens).tokenizer.vocab) == set("new ")


def test_a_folder_of_two_texts_is_refused_by_its_digest(tokens: Path) -> None:
    ids = np.fromfile(tokens / "train.bin", "<u2")
    ids[7] = (ids[7] + 1) % 20
    ids.tofile(tokens / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin is not what was written there \(digest\.json"):
        load_corpus(tokens)
    (tokens / "digest.json").unlink()
    assert np.array_equal(load_corpus(tokens).train, ids)
