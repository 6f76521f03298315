"""Which files of altprop a gradient comes through, in the order in which the call enters them.

Run `python benchmarks/gradient_path.py`; it rewrites the tables of the page
`docs/how-a-gradient-comes-about.md` and draws its pictures, `docs/images/path-*.svg`. Nothing here
knows a file: a tiny model is called once, and whatever function is entered names its own.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from html import escape
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import altprop as ap

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-a-gradient-comes-about.md"
PACKAGE = Path(ap.__file__).parent

Trace = dict[str, list[str]]
"""By phase, the file of every function that was entered, in order."""


def entered(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what `function` returns, and the file of every call into altprop meanwhile."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.append(path.relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        return function(), files
    finally:
        sys.setprofile(before)


def through_an_equilibrium() -> Trace:
    """Return the path of `block(x)` and of the backward pass by AEP."""
    torch.manual_seed(0)
    block = ap.Equilibrium(ap.DampedAttention(16, heads=2), estimator=ap.AEP())
    x = (0.1 * torch.randn(2, 4, 16)).requires_grad_()
    z, forward = entered(lambda: block(x))
    loss = z.square().sum()
    _, backward = entered(loss.backward)
    assert x.grad is not None
    return {"block(x)": forward, "loss.backward()": backward}


def through_direct_feedback() -> Trace:
    """Return the path of a conversion, of the forward pass and of the backward pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x = torch.randn(4, 8)
    _, converting = entered(lambda: ap.convert(model, ap.DirectFeedback(), output="2"))
    y, forward = entered(lambda: model(x))
    loss = y.square().sum()
    _, backward = entered(loss.backward)
    assert all(p.grad is not None for p in model.parameters())
    return {"convert(…)": converting, "model(x)": forward, "loss.backward()": backward}


PATHS = {"equilibrium": through_an_equilibrium, "direct-feedback": through_direct_feedback}


def followed(name: str) -> Trace:
    """Return the path of that name, without the imports that a first call makes on its way."""
    PATHS[name]()
    return PATHS[name]()


def in_order(files: list[str]) -> list[str]:
    """Return each file once, where it is first entered; those that only gather names are none."""
    return [name for name in dict.fromkeys(files) if Path(name).name != "__init__.py"]


def idea(name: str) -> str:
    """Return what a file says of itself: the first line of its docstring."""
    text = ast.get_docstring(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".").replace("|", "\\|")


def table(trace: Trace) -> str:
    """Return a row for each file, with its place in every phase that enters it."""
    phases = {phase: in_order(files) for phase, files in trace.items()}
    names = in_order([name for files in trace.values() for name in files])
    heads = " | ".join(f"`{phase.removeprefix('loss.')}`" for phase in phases)
    lines = [f"| file, and what it says of itself | {heads} |"]
    lines.append("|---|" + "--:|" * len(phases))
    for name in names:
        places = [str(own.index(name) + 1) if name in own else "" for own in phases.values()]
        lines.append(f"| `{name}`<br>{idea(name)} | " + " | ".join(places) + " |")
    return "\n".join(lines)


# Sizes in pixels of the picture, and colours that read on white for any eye.
WIDTH, LABEL, ROW, TOP, GAP = 740, 226, 20, 36, 8
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def picture(trace: Trace) -> str:
    """Return an SVG: a row for each file, and from left to right the calls as they enter them."""
    names = in_order([name for files in trace.values() for name in files])
    rows = {name: number for number, name in enumerate(names)}
    visits = {
        phase: [name for name, _ in groupby(f for f in files if f in rows)]
        for phase, files in trace.items()
    }
    height = TOP + ROW * len(names) + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for name, row in rows.items():
        y = TOP + ROW * row
        if row % 2 == 0:
            out.append(f'<rect x="0" y="{y}" width="{WIDTH}" height="{ROW}" fill="#f4f4f6"/>')
        out.append(
            f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end" fill="#222222">'
            f"{escape(name)}</text>"
        )
    # a phase of few calls is still wide enough for its name
    room = WIDTH - LABEL - GAP * len(visits)
    most = sum(len(v) for v in visits.values())
    shares = {phase: max(len(own) / most, 0.2) for phase, own in visits.items()}
    left = float(LABEL)
    for colour, (phase, own) in zip(COLOURS, visits.items(), strict=False):
        width = room * shares[phase] / sum(shares.values())
        step = width / max(1, len(own))
        out.append(f'<text x="{left:.1f}" y="23" fill="{colour}">{escape(phase)}</text>')
        points = [
            (left + step * (n + 0.5), TOP + ROW * (rows[name] + 0.5)) for n, name in enumerate(own)
        ]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(
            f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-opacity="0.35"/>'
        )
        size = min(10.0, max(1.4, 0.9 * step))
        out += [
            f'<rect x="{x - size / 2:.1f}" y="{y - 5.5:.1f}" width="{size:.1f}" height="11" '
            f'rx="1" fill="{colour}"/>'
            for x, y in points
        ]
        left += width + GAP
        if phase != list(visits)[-1]:
            x = left - GAP / 2
            out.append(f'<path d="M{x:.1f} 12V{height - 8}" stroke="#bbbbbb"/>')
    return "\n".join([*out, "</svg>", ""])


def with_table(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the marks that hold the table of that name."""
    marks = re.compile(rf"(<!-- {name} -->\n\n).*?(\n\n<!-- /{name} -->)", re.DOTALL)
    found, count = marks.subn(lambda m: m[1] + text + m[2], page)
    if count != 1:
        raise SystemExit(f"{PAGE} has {count} places for the table {name}, expected one")
    return found


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in PATHS:
        trace = followed(name)
        page = with_table(page, name, table(trace))
        target = ROOT / "docs" / "images" / f"path-{name}.svg"
        target.write_text(picture(trace), encoding="utf-8")
        print(f"wrote {target.relative_to(ROOT)}")
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
