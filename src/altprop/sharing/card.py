"""A model card: what a shared model was trained by, how good its gradients are, how to load it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from altprop.auditing.report import AuditReport
from altprop.auditing.tables import cut
from altprop.errors import CheckpointError
from altprop.files import write_whole
from altprop.reading import read_bytes
from altprop.sharing.values import read

NAME = "README.md"
LARGEST = 4 << 20  # bytes of a card
_MARK = "<!-- written by altprop -->"


def check_card(folder: Path) -> None:
    """Refuse to replace a README.md that somebody has written.

    **Raises:** `CheckpointError`.
    """
    path = folder / NAME
    if not path.exists():
        return
    try:
        ours = _MARK.encode() in read_bytes(path, LARGEST)
    except OSError:
        ours = False
    if not ours:
        raise CheckpointError(f"{path} is somebody's own: move it, or leave it by card=False")


def write_card(
    folder: Path,
    kind: str,
    parameters: int,
    content: Mapping[str, Any],
    audit: AuditReport | None,
    *,
    reverted: bool,
) -> None:
    """Write the card of a model of that class and size.

    **Arguments:** `content`, of the model's `rules.json`, also of one that is not written.
    """
    lines = ["---", "tags: [altprop]", "---", "", _MARK, f"# {kind}", ""]
    lines += [
        f"A `{kind}` of {parameters:,} parameters that learned by rules other than backprop, with "
        f"altprop and torch {torch.__version__} (Python {platform.python_version()}).",
        "",
        "| places | rule | seed |",
        "|---|---|---|",
    ]
    for call in content["calls"]:
        rule, below = read(call["rule"]), f"{call['path']}: " * bool(call["path"])
        rules = rule if isinstance(rule, dict) else {"all that fit": rule}
        lines += [
            f"| {_cell(below + p)} | {_cell(repr(r))} | {call['seed']} |" for p, r in rules.items()
        ]
    lines += ["", "## How to load it", "", *_loading(kind, content["own"], reverted)]
    if audit is not None:
        lines += ["", "## How good its gradients are", "", *_figures(audit)]
    write_whole(folder / NAME, "\n".join(lines) + "\n")


def _loading(kind: str, own: bool, reverted: bool) -> list[str]:
    if reverted:
        how = (
            f'model = {kind}.from_pretrained("FOLDER")'
            if own
            else 'safetensors.torch.load_model(model, "FOLDER/model.safetensors")'
        )
        return ["It is a plain model again, without its rules:", "", "```python", how, "```"]
    given = kind if own else "model"
    said = "" if own else f"  # model: an untouched {kind}"
    return [
        "```python",
        "import altprop as ap",
        "",
        f'model = ap.from_pretrained("FOLDER", {given}){said}',
        "plain = ap.revert(model)  # without the rules",
        "```",
    ]


def _figures(audit: AuditReport) -> list[str]:
    count = len(audit.trials)
    lines = [
        f"Beside {audit.reference.arm.name}, over {count} trial{'s' * (count != 1)}, as altprop's "
        "audit measured it: cosine and norm ratio of the gradient, over the parameters.",
        "",
        "| gradient | mean cosine | worst cosine | mean norm ratio | no figure for |",
        "|---|---|---|---|---|",
    ]
    for row in audit.rows:
        cosine, ratio = row.mean("cosine").mean, row.mean("norm_ratio").mean
        figures = (cut(cosine, 5), cut(row.worst("cosine"), 5), cut(ratio, 4))
        left = ", ".join(sorted(row.flags)) or "–"
        lines.append(f"| {_cell(row.arm.name)} | {' | '.join(figures)} | {_cell(left)} |")
    return lines


def _cell(text: str) -> str:
    """Return a text as a cell of a table, as it is."""
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")
