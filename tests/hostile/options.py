"""Malformed words of the command line, and malformed configurations."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path
from random import Random

from altprop.lab.choices import types_of
from altprop.lab.settings import TrainConfig
from hostile.files import put_something_else, spoil
from hostile.values import (
    AUDIT,
    CLASSES,
    LONG,
    NUMBERS,
    PATHS,
    RESUME,
    SAMPLE,
    SHORT,
    TEXTS,
    WORDS,
    hostile,
)  # fmt: skip


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
        # an audit's time grows with its batch, as a run's with its steps
        like = "steps" if (base[0], name) == ("audit", "batch") else name
        value = draw.choice(PATHS) if draw.random() < 0.3 else hostile(draw, like)
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
