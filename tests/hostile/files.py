"""Files that are spoiled, or not files at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from hostile.values import VALUES


def spoiled(draw: Random, raw: bytes) -> bytes:
    """Return bytes with a few of them changed, cut out, doubled or put in."""
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        start = draw.randrange(len(raw) + 1)
        end = min(len(raw), start + draw.choice([1, 1, 2, 8, 100]))
        put = draw.choice(
            [
                b"",
                b"\x00",
                b"\xff",
                b"\x1b[2J",
                b"\xed\xa0\x80",
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"9" * 400,
            ]
            + [
                bytes([draw.randrange(256)]),
                raw[start:end] * 2,
                b"[" * 2000,
                b'{"a":' * 2000,
                b"\n",
                b"-",
            ]
        )
        raw = raw[:start] + put + raw[end:]
    return raw[: draw.randrange(len(raw) + 1)] if draw.random() < 0.15 else raw


def put_something_else(draw: Random, path: Path) -> None:
    """Put what is no regular file in the place of one, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match draw.randrange(6):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(
                draw.choice(["/dev/zero", "/proc/self/mem", "/dev/full", "/dev/random"])
            )
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.write_bytes(b"")


def spoil(draw: Random, path: Path) -> None:
    """Spoil a file, or put something else in its place."""
    if draw.random() < 0.1:
        put_something_else(draw, path)
    else:
        path.write_bytes(spoiled(draw, path.read_bytes()))


def spoil_json(draw: Random, path: Path, times: int = 1) -> None:
    """Spoil a file of JSON: mostly what it says, which then is still JSON, or else its bytes."""
    if draw.random() < 0.15:
        spoil(draw, path)
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(times * draw.choice([1, 1, 1, 2, 4])):
        data = changed(draw, data)
    text = json.dumps(data)
    if draw.random() < 0.05:  # what no library would write
        start = draw.randrange(len(text))
        put = draw.choice(["9" * 5000, "1e999", "-", "[" * 100_000, '{"a":' * 50_000, '"a":1,'])
        text = text[:start] + put + text[start:]
    path.write_text(text, encoding="utf-8")


def changed(draw: Random, data: Any) -> Any:
    """Return plain data with one value in it, or the whole, another, gone, doubled or moved."""
    inside = isinstance(data, (dict, list)) and len(data) > 0
    if not inside or draw.random() < 0.05:
        return another(draw, data)
    key: Any = draw.choice(list(data)) if isinstance(data, dict) else draw.randrange(len(data))
    if isinstance(data[key], (dict, list)) and data[key] and draw.random() < 0.8:
        data[key] = changed(draw, data[key])
        return data
    match draw.randrange(8):
        case 0:
            del data[key]
        case 1 if isinstance(data, dict):
            data[draw.choice(["x", "", "\x1b[2J", "\ud800", "a\nb", str(key) * 2])] = data[key]
        case 2 if isinstance(data, dict):
            data[key] = data[draw.choice(list(data))]
        case 1:
            data.insert(key, data[draw.randrange(len(data))])
        case 2:
            draw.shuffle(data)
        case _:
            data[key] = another(draw, data[key])
    return data


def another(draw: Random, value: Any) -> Any:
    """Return a value for the place of another one, of another type or of a wrong size."""
    near: list[Any] = []
    if isinstance(value, (int, float)):
        near = [-value, value + 1, 10**6 * value, str(value), [value]]
        if abs(value) < 2**63:
            near += [value + 0.5, value / 3]
    elif isinstance(value, str):
        near = [value * 2, value[:-1], value[:50] * 1000, [value], f"{value}\x1b[2J", value.upper()]
    elif isinstance(value, list):
        near = [value * 2, value[:-1], [value], {"a": value}, dict.fromkeys(map(str, value))]
    elif isinstance(value, dict):
        near = [[value], list(value), {"a": value}, list(value.values())]
    return copy.deepcopy(draw.choice([*VALUES, *near, *near]))
