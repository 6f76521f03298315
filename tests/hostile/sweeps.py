"""Malformed sweeps: their words, their files, and the studies of those that stand."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from altprop.lab.choices import types_of
from altprop.lab.cli import main
from altprop.lab.settings import TrainConfig
from hostile.files import another, changed, put_something_else, spoil
from hostile.values import CLASSES, FAST, LONG, NUMBERS, PATHS, TEXTS, VALUES, WORDS, hostile

SWEEP = ["sweep", "spec.yaml", "--trials", "1", "--widen", "0"]
GOOD: dict[str, Any] = {
    "lr": {"low": 0.001, "high": 0.01, "log": True},
    "layers": [1, 2],
    "rule": ["SignSymmetry", None],
}


def good_sweep(train: Sequence[str]) -> None:
    """Make the file of a sweep, and a sweep of one trial."""
    base = dict(zip((word[2:] for word in train[1::2]), train[2::2], strict=True))
    plain = {name: yaml.safe_load(value) for name, value in base.items()}
    text = yaml.safe_dump({**plain, "model": "gpt", "sweep": GOOD})
    Path("spec.yaml").write_text(text, encoding="utf-8")
    assert main([*SWEEP, "--out", "swept"]) == 0


def _range(draw: Random, long: bool) -> Any:
    """Return what is searched of an option, as it should not be."""
    numbers = [x for x in VALUES if not long or not isinstance(x, (int, float)) or abs(x) < 3]
    held: Any = {"low": 0.001, "high": 0.01, "log": True}
    match draw.randrange(5):
        case 0:
            return changed(draw, [1, 2, "x"]) if not long else [draw.choice(numbers)]
        case 1:
            held = {"low": draw.choice(numbers), "high": draw.choice(numbers)}
            if draw.random() < 0.5:
                held["log"] = draw.choice([True, False, "x", None, 1])
            return held
        case 2:
            return [draw.choice(FAST if long else WORDS) for _ in range(draw.choice([1, 2, 30]))]
        case 3:
            held[draw.choice(["low", "high", "log", "x"])] = draw.choice(numbers)
            return held
        case _:
            return draw.choice(numbers)


def _spoil_spec(draw: Random, path: Path) -> None:
    """Spoil the file of a sweep: its bytes, what it searches, its options."""
    option = draw.choice([*types_of(TrainConfig), "sweep", "estimator.tol", "stabiliser.target"])
    long = option.rpartition(".")[2] in LONG
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    match draw.randrange(8):
        case 0:
            spoil(draw, path)
            return
        case 1:
            said = {**said, option: None if long else another(draw, said.get(option))}
        case 2:
            said["sweep"] = changed(draw, said["sweep"])
        case 3:
            word = draw.choice(CLASSES if long else [*NUMBERS, *CLASSES, *TEXTS, *PATHS])
            line = f"{option}: {word}\n"
            text = yaml.safe_dump(said) if option not in said else ""
            path.write_text(text + line, "utf-8", "surrogatepass")
            return
        case 4:
            many = {f"{name}.x": [1] for name in types_of(TrainConfig)}
            said["sweep"] = draw.choice([VALUES[-1], VALUES[-2], [], "x", None, {"": [1]}, many,
                                         {"\x1b[2J": [1]}, {"a.b.c": [1]}, {7: [1]}])  # fmt: skip
        case _:
            said["sweep"] = {**said["sweep"], option: _range(draw, long)}
    with contextlib.suppress(UnicodeEncodeError):  # of half a character, which YAML cannot hold
        path.write_text(yaml.safe_dump(said), encoding="utf-8")


def _spoil_study(draw: Random, path: Path) -> None:
    """Spoil a study: its bytes, or what its tables hold."""
    if draw.random() < 0.35:
        raw = bytearray(path.read_bytes())
        match draw.randrange(5):
            case 0:
                spoil(draw, path)
            case 1:
                put_something_else(draw, path)
            case 2:
                os.truncate(path, draw.choice([0, 1, 100, 4096, 8192, len(raw) // 2, len(raw) - 1]))
            case 3:
                path.with_name("study.db-journal").write_bytes(draw.randbytes(5000))
            case _:
                for _ in range(draw.choice([1, 20, 500])):
                    raw[draw.randrange(len(raw))] = draw.randrange(256)
                path.write_bytes(raw)
        return
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        base.execute("PRAGMA foreign_keys = OFF")
        names = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        tables = [name for (name,) in base.execute(names)]
        for _ in range(draw.choice([1, 1, 2, 4])):
            table = draw.choice(tables)
            columns = [row[1] for row in base.execute(f"PRAGMA table_info({table})")]
            if not columns:
                continue
            column = draw.choice(columns)
            match draw.randrange(8):
                case 0:
                    base.execute(f"DELETE FROM {table}")
                case 1:
                    base.execute(f"DROP TABLE IF EXISTS {table}")
                case 2:
                    text = json.dumps(draw.choice(VALUES))
                    _update(base, table, column, text)
                case 3:
                    states = ["RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING", "x"]
                    _update(base, "trials", "state", draw.choice(states))
                case 4:
                    key = draw.choice(["ranges", "closed", "beyond", "failed", "unfit", "x"])
                    given = [{"lr": [1, 2]}, {"lr": "x"}, {"lr": []}, [["lr", 1, "x"]], [[1]], 7]
                    for kind, name in (("study", "studies"), ("trial", "trials")):
                        with contextlib.suppress(sqlite3.Error):
                            base.execute(
                                f"INSERT INTO {kind}_user_attributes ({kind}_id, key, value_json) "
                                f"SELECT {kind}_id, ?, ? FROM {name}",
                                (key, json.dumps(draw.choice([*given, *VALUES]))),
                            )
                case _:
                    odd = [None, "x", -1, 1e308, 2**62, b"\xff", "", 0, float("inf"), "\x1b[2J"]
                    _update(base, table, column, draw.choice(odd))


def _update(base: sqlite3.Connection, table: str, column: str, value: object) -> None:
    with contextlib.suppress(sqlite3.Error):  # of what the table refuses
        base.execute(f"UPDATE {table} SET {column} = ?", (value,))


def spec(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """The file of a sweep, the folder and the study of one that stands, words of the command."""
    again = [*SWEEP, "--out", "swept", "--resume"]
    match draw.randrange(8):
        case 0 | 1 | 2:
            _spoil_spec(draw, here / "spec.yaml")
            if draw.random() < 0.1:
                put_something_else(draw, here / "spec.yaml")
            return [*SWEEP, "--out", "new"] if draw.random() < 0.8 else list(again)
        case 3:
            path = here / "swept" / draw.choice(["sweep.yaml", "sweep.yaml", ".lock", "trials"])
            if path.is_dir():
                os.rename(path, here / "swept" / "aside")
                put_something_else(draw, path)
            elif path.name == "sweep.yaml" and draw.random() < 0.8:
                _spoil_spec(draw, path)
            else:
                put_something_else(draw, path)
            return [*again, "--trials", draw.choice(["1", "2"])]
        case 4 | 5 | 6:
            _spoil_study(draw, here / "swept" / "study.db")
            more = draw.choice([["--trials", "2"], [], [], ["--widen", "1"]])
            return [*again, *more] if draw.random() < 0.9 else [*again[:-1], "--overwrite"]
    os.mkfifo(here / "fifo")
    (here / "loop").symlink_to("loop")
    base = list(SWEEP) if draw.random() < 0.7 else list(again)
    names = ["spec", "trials", "widen", "workers", "prune", "seed", "out", "resume", "overwrite"]
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice([*names, *names, "config", "import", "help", "print_config", "x.y"])
        value = draw.choice(PATHS) if draw.random() < 0.4 else hostile(draw, name)
        base += [f"--{name}={value}"]
    return base
