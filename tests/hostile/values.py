"""Words and values that nothing should take."""

from __future__ import annotations

import json
import re
from random import Random

import altprop as ap
from altprop.lab.choices import choices, types_of

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
LONG |= {"trials", "widen", "workers", "budget", "search_steps"}
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


# what a value of JSON should not be
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 0.5, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**32, 2**63),
    *(-(2**63), 10**30, 10**400, float("nan"), float("inf"), float("-inf"), 1_000_000),
    *("", " ", "x", "\x00", "\ud800", "\x1b[2J", "\u202eevil", "a\nb", "x" * 5000, "1", "nan"),
    *([], {}, [[]], [None], [{}], {"a": 1}, {"": None}, [1, "x"], [[1, 2], [3]], ["x"] * 50),
    *(json.loads("[" * 40 + "]" * 40), json.loads('{"a":' * 40 + "1" + "}" * 40)),
]
