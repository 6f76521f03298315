"""Malformed input of every kind that the command line reads, drawn at random for `fuzz.py`.

A kind is a function of a random generator, of a folder with good input, which it may spoil, and of
the words of a good tiny run; it returns the words of a command.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import altprop as ap
from altprop.lab import checkpoint as saved
from altprop.lab.choices import choices, types_of
from altprop.lab.settings import TrainConfig

Kind = Callable[[Random, Path, Sequence[str]], list[str]]

# What no number, text, path or class should be. None of these paths can be written by anybody.
DEEP = [
    "(" * 200,
    "[" * 5000,
    "{'a':" * 400,
    "-" * 9000 + "1",
    "AEP(" * 300 + ")" * 300,
    "a." * 4000,
]
NUMBERS = [
    "9" * 400,
    "-" + "9" * 400,
    "1e400",
    "9" * 5000,
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e-320",
]
NUMBERS += [
    "2000000",
    "1000000000000",
    str(2**63),
    str(2**31),
    "0.5",
    "1e999999999",
    "0x10",
    "1_000",
]
TEXTS = [
    "",
    " ",
    "\x00",
    "a\x00b",
    "\x1b[2J\x1b[31mred",
    "\u202eevil",
    "\ud800",
    "\udcff",
    "\x9b31m",
]
TEXTS += [
    "a\nb\rc",
    "\u2028",
    "x" * 5000,
    "\N{PILE OF POO}",
    "[bold]x[/italic]",
    "%s{0}",
    "\\",
    "'",
    '"',
]
TEXTS += [
    "null",
    "None",
    "true",
    "!!python/object:os.system",
    "__import__('os')",
    "lambda: 0",
    "os.system",
]
PATHS = ["/", ".", "..", "~nosuchuser/x", "~", "/proc/self/mem", "/proc/self/environ", "/dev/zero"]
PATHS += [
    "/dev/stdin/x",
    "fifo",
    "text.txt/x",
    "a" * 300,
    "a/" * 2500,
    "\udcff\udcfe",
    "loop",
    "nothing",
]
PATHS += [
    "run",
    "tokens",
    "text.txt",
    "good.yaml",
    "run/last.safetensors",
    "/proc/self/fd/99",
    "\x1b]0;x\x07",
]
CLASSES = [
    *("AEP(tol=", "AEP(solver=GMRES(), ", "Anderson(memory=0)", "AEP(1,2,3,4,5,6,7,8,9,10,11,12)"),
    *(
        "AEP(beta=1e400)",
        "Anderson(tol='a')",
        "Fallback(())",
        "Fallback([Anderson()]*9)",
        "AEP(**{})",
    ),
    *(
        "AEP(solver=AEP())",
        "AEP.__class__",
        "Fallback((" + "Anderson()," * 500 + "))",
        "AEP(beta=-0)",
    ),
]
WORDS = [*NUMBERS, *TEXTS, *PATHS, *DEEP, *CLASSES]
# options that a run's time grows with: a long run is no fault, so these get no long one
LONG = {
    "steps",
    "sample",
    "tokens",
    "final_windows",
    "eval_every",
    "seeds",
    "repeats",
    "phase_steps",
}
LONG |= {"layers", "refused_in_a_row", "eval_windows"}
FAST = [w for w in WORDS if not re.fullmatch(r"[\d_]{2,300}", w)]
SHORT = {"steps": "1", "eval_windows": "2", "final_windows": "2", "sample": "0", "data": "text.txt"}
AUDIT = ["audit", "--data", "text.txt", "--d_model", "8", "--heads", "2", "--context", "8"]
AUDIT += ["--batch", "2", "--seeds", "1", "--repeats", "0", "--rows", "AEP"]
SAMPLE = ["sample", "run", "--tokens", "20"]
RESUME = ["train", "--config", "run/config.yaml", "--resume", "--steps", "2"]
PARTS = (ap.AbstractRule, ap.AbstractEstimator, ap.AbstractSolver, ap.AbstractStabiliser)


def hostile(draw: Random, option: str = "") -> str:
    """Return a word that an option should not take."""
    if draw.random() < 0.15:
        part = draw.choice(PARTS)
        name = draw.choice(list(choices(part)))
        fields = list(types_of(choices(part)[name])) or ["x"]
        return (
            f"{name}({draw.choice(fields)}={draw.choice([*NUMBERS[:12], repr('x'), '[]', name])})"
        )
    return draw.choice(FAST if option.rpartition(".")[2] in LONG else WORDS)


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


def words(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """Words of the command line: options, paths and values of every command."""
    os.mkfifo(here / "fifo")
    (here / "loop").symlink_to("loop")
    base = draw.choice(
        [
            list(train),
            [*train, "--model", "gpt", "--rule", "SignSymmetry"],
            ["explain", *train[1:], "--model", "gpt", "--rule", "DirectFeedback"],
            ["sample", "run", "--tokens", "3"],
            ["data", "text.txt"],
            ["data", "text.txt", "--out", "new"],
            list(AUDIT),
            ["audit", "--model", "gpt", "--data", "text.txt", "--d_model", "8", "--heads", "2",
             "--context", "8", "--batch", "2", "--layers", "1", "--rules", "SignSymmetry"],
        ]
    )  # fmt: skip
    names = {
        "train": list(types_of(TrainConfig)),
        "explain": list(types_of(TrainConfig)),
        "sample": ["run", "prompt", "tokens", "temperature", "top_k", "seed", "which", "device"],
        "data": ["corpus", "out", "overwrite"],
        "audit": ["data", "seeds", "seed", "rows", "repeats", "phase_steps", "batch", "context",
                  "d_model", "heads", "scale", "damping", "model", "rules", "layers", "steps",
                  "json", "png"],
    }[base[0]]  # fmt: skip
    names = [*names, "config", "import", "help", "print_config"]
    dotted = ["solver.tol", "estimator.beta", "estimator.solver", "stabiliser.target", "rules.x"]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if draw.random() < 0.1:
            base.insert(draw.randrange(len(base) + 1), draw.choice(WORDS))
            continue
        name = draw.choice(
            [*names] * 4 + [*dotted, f"{draw.choice(names)}.help", draw.choice(TEXTS)]
        )
        value = draw.choice(PATHS) if draw.random() < 0.3 else hostile(draw, name)
        value = "fifo/x" if name in ("json", "png") and value.startswith("/dev") else value
        base += [f"--{name}={value}"] if draw.random() < 0.5 else [f"--{name}", value]
    return base


def config(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A configuration: spoiled bytes, hostile values, nesting, aliases, tags, no file at all."""
    path, good = here / "bad.yaml", (here / "good.yaml").read_bytes()
    path.write_bytes(good)
    lines = good.decode().splitlines()
    option = draw.choice(list(types_of(TrainConfig)))
    at = draw.randrange(len(lines))
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{('*' + b + ', ') * 9}]\n" for b, c in zip(
        string.ascii_lowercase, string.ascii_lowercase[1:12], strict=False))  # fmt: skip
    line = draw.choice(
        [
            *(f"{option}: {word}" for word in draw.sample([*NUMBERS, *CLASSES, *PATHS], 6)),
            *(f"{option}: {json.dumps(word)}" for word in draw.sample(WORDS, 6)),
            *(f"{option}: {c * draw.choice([40, 1000, 50_000])}" for c in ("[", "{a: ", "- ")),
            f"{option}: &x [*x]", f"{option}: {{<<: *y}}", "rules: &r {a: *r}", f"{option}: [a, b",
            f"{option}: !!binary aGk=", f"{option}: 2000-99-99", f"{option}: 2000-01-01",
            f"{option}: !!set {{a, b}}", f"{option}: !!python/name:os.system", f"{option}: !x y",
            f"{option}: !!int {'9' * 5000}", f"{option}: {'1:' * 20_000}1",
            f"{option}: 0x{'f' * 9000}",
            f"{option}: {{class_path: os.system, init_args: {{command: touch mark}}}}",
            f"{option}: {{class_path: altprop.AEP, init_args: [1]}}", "out: /", "? [a]\n: b",
            "import: antigravity", "config: good.yaml", "json: /tmp/x", "%YAML 9.9", "\x85", "1: 2",
            bomb, bomb + f"{option}: *l", "rules: {1: a}", "rules: {a: {b: c}}", "freeze: [[a]]",
            "---\n---", "out: ../x",
        ]
    )  # fmt: skip
    match draw.randrange(8):
        case 0:
            spoil(draw, path)
        case 1:
            put_something_else(draw, path)
        case 2:
            path.write_bytes(line.encode("utf-8", "surrogatepass"))
        case 3:
            lines[at] = (
                lines[at].partition(":")[0] + ": " + hostile(draw, lines[at].partition(":")[0])
            )
            path.write_text("\n".join(lines), "utf-8", "surrogatepass")
        case 4:
            path.write_bytes(b"a" * draw.choice([1, 10_000, 1_000_000]))
        case _:
            kept = [x for x in lines if x.partition(":")[0] != line.partition(":")[0]]
            path.write_text("\n".join([*kept, line, ""]), "utf-8", "surrogatepass")
    if path.is_file() and draw.random() < 0.2:  # as that of a run
        os.replace(path, here / "run" / "config.yaml")
        return list(draw.choice([SAMPLE, RESUME]))
    said = re.match(r"\w*", line)
    short = [w for k, v in SHORT.items() if not said or k != said[0] for w in (f"--{k}", v)]
    if said and said[0] in LONG and re.search(r"\b[\d_]{2,300}$", line):
        short = [w for pair in SHORT.items() for w in (f"--{pair[0]}", pair[1])]
    return draw.choice(
        [["train", "--config", "bad.yaml", *short], ["train", "--config", "bad.yaml", *short],
         ["explain", "--config", "bad.yaml"], ["train", "--config", "bad.yaml", "--print_config"],
         ["sample", "--config", "bad.yaml"], ["audit", "--config", "bad.yaml", *AUDIT[1:]],
         ["data", "--config", "bad.yaml"]]
    )  # fmt: skip


def corpus(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A text, or a folder of texts."""
    path = here / "text.txt"
    if draw.random() < 0.3:
        (here / "texts").mkdir()
        for name in draw.sample(
            ["a.txt", "b.md", "\udcff.txt", "\x1b[2J.txt", "c.TXT", ".d.txt"], 3
        ):
            (here / "texts" / name).write_bytes(path.read_bytes()[: draw.choice([0, 1, 500, 9999])])
        target = draw.choice(sorted((here / "texts").iterdir()))
        path.unlink()
        path.symlink_to("texts")
    else:
        target = path
    match draw.randrange(6):
        case 0:
            put_something_else(draw, target)
        case 1:
            target.write_text("".join(draw.choices(TEXTS, k=draw.choice([1, 30, 90]))), "utf-8",
                              "surrogatepass")  # fmt: skip
        case 2:
            target.write_bytes(draw.randbytes(draw.choice([0, 1, 2, 30, 5000])))
        case 3:
            points = (chr(draw.randrange(0x110000)) for _ in range(draw.choice([2, 40, 3000])))
            target.write_text("".join(points), "utf-8", "surrogatepass")
        case _:
            spoil(draw, target)
    out = ["--out", "new"] * (draw.random() < 0.5)
    explain = ["explain", *train[1:], "--model", "gpt", "--rule", "SignSymmetry"]
    return draw.choice([[*train], ["data", "text.txt", *out], explain])


def tokens(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A prepared folder: its tokens, its vocabulary, its pickle."""
    folder = here / "tokens"
    for name in draw.sample(sorted(os.listdir(folder)), draw.choice([1, 1, 2])):
        path = folder / name
        size = path.stat().st_size
        match draw.randrange(8):
            case 0:
                put_something_else(draw, path)
            case 1 | 2 if name.endswith(".bin"):
                ids = np.fromfile(path, "<u2")
                ids[draw.randrange(len(ids))] = draw.choice([65535, 1000, 27])
                ids.tofile(path)
            case 3:
                os.truncate(
                    path, draw.choice([0, 1, 2, 15, 16, 18, size // 2, size + 1, size + 4096])
                )
            case 4 if name == "meta.pkl":
                meta = draw.choice(
                    [{"itos": {}}, {"itos": 7, "stoi": {}, "vocab_size": 0}, [], os.system]
                )
                path.write_bytes(pickle.dumps(meta))
            case 5:
                path.unlink()
            case _:
                spoil(draw, path)
    if draw.random() < 0.3:
        for name in ("vocab.json", "digest.json"):
            (folder / name).unlink(missing_ok=True) if not (folder / name).is_dir() else None
    argv = list(train)
    argv[2] = "tokens"
    replace = ["--out", "tokens", "--overwrite"]
    data = [["data", "tokens"], ["data", "tokens", *replace], ["data", "text.txt", *replace]]
    return draw.choice([argv, *data])


def vocabulary(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """The vocabulary of a run or of a prepared folder."""
    path = here / draw.choice(["run", "tokens"]) / "vocab.json"
    content: dict[str, Any] = json.loads(path.read_text())
    characters: list[Any] = content["characters"]
    match draw.randrange(8):
        case 0 | 1:
            spoil(draw, path)
        case 2:
            put_something_else(draw, path)
        case 3:
            path.write_text(
                draw.choice(["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "1e999", "NaN"])
            )
        case _:
            bad: list[Any] = [*TEXTS, 7, None, [], {}, 10**400, "\ud800", "ab", characters[0]]
            for _ in range(draw.choice([1, 3])):
                match draw.randrange(5):
                    case 0:
                        characters.insert(draw.randrange(len(characters)), draw.choice(bad))
                    case 1:
                        characters.pop(draw.randrange(len(characters)))
                    case 2:
                        content[draw.choice(list(content))] = draw.choice(bad)
                    case 3:
                        characters[draw.randrange(len(characters))] = chr(draw.randrange(0x110000))
                    case _:
                        draw.shuffle(characters)
                if not isinstance(content.get("characters"), list) or len(characters) < 2:
                    break
            path.write_text(json.dumps(content), encoding="utf-8")
    argv = list(train)
    argv[2] = "tokens"
    return draw.choice([list(SAMPLE), argv, ["data", "tokens"], list(RESUME)])


def checkpoint(draw: Random, here: Path, train: Sequence[str]) -> list[str]:
    """A checkpoint of a run: its bytes, its tensors, its notes."""
    which = draw.choice(["best", "last"])
    path = here / "run" / f"{which}.safetensors"
    if draw.random() < 0.25:
        spoil(draw, path)
    elif draw.random() < 0.05:
        put_something_else(draw, path)
    else:
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name).clone() for name in file.keys()}
            header = dict(file.metadata())
        notes = json.loads(header["notes"])
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(sorted(held))
            tensor = held[name]
            changed: list[Any] = [
                None, tensor.flatten(), tensor.double(), tensor.to(torch.bfloat16), tensor.long(),
                torch.empty(0), torch.zeros(3, 3), tensor.unsqueeze(0), torch.full_like(tensor, 7),
                tensor.to(torch.uint8),
            ]  # fmt: skip
            if tensor.dim() == 2:
                changed.append(tensor.t().contiguous())
            values: list[Any] = [
                None,
                -1,
                "x",
                10**400,
                1e308,
                [],
                {},
                [[[]]],
                True,
                [10**30],
                2**62,
            ]
            match draw.randrange(6):
                case 0 | 1 | 2:
                    new = draw.choice(changed)
                    held.pop(name) if new is None else held.update({name: new})
                case 3:
                    names = ["model.x", "extra.x", "x", ".", "optimiser.x.exp_avg", "training.y"]
                    held[draw.choice(names)] = tensor.clone()
                case 4:
                    header[draw.choice(["format", "notes"])] = draw.choice(
                        [
                            "",
                            "[" * 100_000,
                            "{}",
                            "[]",
                            "7",
                            "{",
                            '{"a":' * 9000,
                            "\x1b[2J",
                            "altprop/9",
                        ]
                    )
                case _:
                    part = draw.choice([notes, notes.get("progress", notes)])
                    if isinstance(part, dict):
                        part[draw.choice([*part, "x"])] = draw.choice(values)
                    header["notes"] = json.dumps(notes)
        if "sums" in header and draw.random() < 0.8:  # by somebody who knows the checksums
            sums = {name: saved._sum(tensor) for name, tensor in held.items()}
            header["sums"] = json.dumps(sums)
            header["digest"] = saved._digest(header)
        save_file(held, path, header)
    return list(SAMPLE if which == "best" else draw.choice([RESUME, [*SAMPLE, "--which", "last"]]))


KINDS: dict[str, Kind] = {
    f.__name__: f for f in (words, config, corpus, tokens, vocabulary, checkpoint)
}
