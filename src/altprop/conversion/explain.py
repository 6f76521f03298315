"""Which parameter gets which signal, and why: the table behind `print(explain(model))`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from altprop.conversion.layers import NO_MATRICES
from altprop.conversion.learned import learned_feedback
from altprop.conversion.record import Description, parts_of, record_of, sites_of
from altprop.equilibrium.module import Equilibrium
from altprop.errors import RuleError

_LISTS = (nn.ModuleList, nn.Sequential)  # whose members run as they stand


@dataclass(frozen=True)
class Row:
    """One parameter of a converted model."""

    parameter: str
    rule: str
    signal: str
    """Where its gradient comes from: exact, random feedback, broadcast error, and so on."""
    feedback: tuple[int, ...] | None
    """The shape of the feedback that belongs to its module, if any."""
    kind: str
    """fixed, learned, or drawn at every pass; empty without feedback."""
    seed: int | None
    transports: bool
    """Whether the backward pass still multiplies by this weight's exact transpose, if anything
    below it is to receive a gradient."""
    measured: str = ""
    """What was measured of it, where something was."""


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, the first of them its head; an empty cell is a dash."""
    lines = [[cell or "–" for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return [text[0], "  ".join("─" * width for width in widths), *text[1:]]


@dataclass(frozen=True)
class Table:
    """What `explain` returns: `rows`, one per parameter, and `notes`."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head: tuple[str, ...] = (
            "parameter", "rule", "signal", "feedback", "kind", "seed", "Wᵀ remains", "measured",
        )  # fmt: skip
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            shape = "×".join(map(str, row.feedback or ()))
            seed, remains = "" if row.seed is None else str(row.seed), "yes" * row.transports
            cells = (row.parameter, row.rule, row.signal, shape, row.kind, seed, remains)
            lines.append((*cells, row.measured))
        if not any(row.measured for row in self.rows):
            lines = [line[:-1] for line in lines]
        return "\n".join([*aligned(lines), *(f"note: {note}" for note in self.notes)])


class _Region(NamedTuple):
    """The module at `start` in the order of registration and all in it, up to `end`."""

    start: int
    end: int
    told: Description


class _Map:
    """A model's modules in the order of registration, and what its places send to those below."""

    def __init__(self, model: nn.Module) -> None:
        self.order = list(model.named_modules(remove_duplicate=False))
        self.index = {path: index for index, (path, _) in enumerate(self.order)}
        self.senders: list[tuple[int, str]] = []
        self.regions: list[_Region] = []
        for index, (path, module) in enumerate(self.order):
            inside = f"{path}." if path else ""
            end = index
            while end + 1 < len(self.order) and self.order[end + 1][0].startswith(inside):
                end += 1
            for key, told in described(module).items():
                if not key:
                    self.regions.append(_Region(index, end, told))
                if told.below and not told.cuts:
                    self.senders.append((index, told.below))

    def above(self, index: int) -> list[Description]:
        """Return what is told of the modules that hold the one at `index`, the innermost first."""
        return [r.told for r in reversed(self.regions) if r.start <= index <= r.end]

    def owner(self, index: int, name: str) -> tuple[int, str]:
        """Return the place of the module whose weight a parameter is or makes up, and its name."""
        path, module = self.order[index]
        above, found, below = f".{path}".partition(".parametrizations.")
        if found:
            owner, weight = self.index[above[1:]], below.split(".")[0]
            if is_parametrized(self.order[owner][1], weight):
                return owner, weight
        made = name.rpartition("_")[0]  # by hooks, as of weight_v and weight_g
        if made not in module._parameters and isinstance(getattr(module, made, None), Tensor):
            return index, made
        return index, name

    def signal(self, index: int) -> str:
        """Say what the module at `index` receives from what was registered after it."""
        cuts = [r for r in self.regions if r.told.cuts and r.end >= index]
        first = min(cuts, key=lambda r: r.end, default=None)
        cut = len(self.order) if first is None else first.end
        signals = {text for at, text in self.senders if index < at <= cut}
        if first is not None:
            signals.add(first.told.below)
        solved = next((told for told in self.above(index) if told.own), None)
        if solved is not None:
            signals = signals - {solved.below} | {solved.own}
        told = " and ".join(sorted(signals)) or "exact"
        if solved is not None or sites_of(self.order[index][1]):
            return told
        before = {text for at, text in self.senders if at < index and self._unordered(at, index)}
        unsure = " and ".join(sorted(before - signals))
        return f"{told} or {unsure} (order unknown)" if unsure else told

    def _unordered(self, one: int, other: int) -> bool:
        """Say whether two modules are parts of one block, which may run in any order."""
        shared = os.path.commonprefix([self.order[at][0].split(".") for at in (one, other)])
        around = [self.order[self.index[".".join(shared[:n])]][1] for n in range(len(shared) + 1)]
        return not isinstance(around.pop(), _LISTS) and any(isinstance(m, _LISTS) for m in around)


def described(module: nn.Module) -> dict[str, Description]:
    """Return what a module's own places tell, by their parameters' names; of all in it by none."""
    told: dict[str, Description] = {}
    for key, site in sites_of(module).items():
        for name in (site.stored.weight, site.stored.bias) if key else ("",):
            told.setdefault(name, site.describe(module))  # several maps may share one bias
    if isinstance(module, Equilibrium):
        rule, signal = type(module.estimator).__name__, "adjoint state of an equilibrium"
        told[""] = Description(rule, own=signal, below=signal)
    return told


def explain(model: nn.Module, measured: Mapping[str, object] | None = None) -> Table:
    """Return, for each parameter of `model`, the rule and the signal that reaches it.

    `model` may be a part of what was converted; then only the places in it are told of. The order
    in which modules were registered is taken for the order in which they run: what comes after the
    last place of a rule still receives exact gradients. Norms are the exception, for torch's own
    and Hugging Face's blocks register last what runs first: of what follows the places of its own
    block but holds none, both signals are told, and that the order is unknown.

    Whether a transpose remains is read off the modules as they are. A matrix in a module of an
    unknown kind counts as one that a cotangent is multiplied by, unless its first axis is 1, as
    that of a table of positions.

    **Arguments:** `measured`, what `audit_step` or `watch` found of this model, by a parameter's
    name, which stands beside what should be.

    **Raises:** `RuleError` if no rule, no `Equilibrium` and no converted stack is in `model`.
    """
    modules = list(model.modules())
    if not any(record_of(m) or described(m) for m in modules):
        raise RuleError(
            f"this {type(model).__name__} was not converted: call convert(model, rule), or explain "
            "the whole model that it is a part of"
        )
    found = _Map(model)
    rows: dict[str, Row] = {}
    first: dict[int, str] = {}
    for index, (_, module) in enumerate(found.order):
        record = record_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            if record is not None and name in record.names:
                continue
            row = _row(found, index, name, parameter)
            name = first.setdefault(id(parameter), row.parameter)
            rows[name] = _tied(rows[name], row) if name in rows else row
    notes = []
    learned = [name for name, _, _ in learned_feedback(model)]
    if learned:
        notes.append(
            f"{len(learned)} learned feedback matrices ({learned[0]}, …): an optimiser built "
            "before convert lacks them and leaves them as drawn: add_feedback(optimizer, model)"
        )
    kept = [row.parameter for row in rows.values() if row.transports]
    if kept:
        are = "weight is" if len(kept) == 1 else "weights are"
        notes.append(f"{len(kept)} {are} still transported exactly")
    beside = {name: str(found) for name, found in (measured or {}).items()}
    told = (replace(row, measured=beside.get(name, "")) for name, row in rows.items())
    return Table(tuple(told), tuple(notes))


def _tied(old: Row, new: Row) -> Row:
    """Return the row of a parameter that stands in two places."""
    same = old.signal == new.signal
    return replace(
        old if old.kind or not new.kind else new,
        parameter=old.parameter,
        signal=old.signal if same else f"{old.signal} + {new.signal} (tied)",
        transports=old.transports or new.transports,
    )


def _row(found: _Map, index: int, name: str, parameter: nn.Parameter) -> Row:
    """Return the row of a parameter of the module at `index`."""
    full = f"{found.order[index][0]}.{name}".lstrip(".")
    index, weight = found.owner(index, name)
    module = found.order[index][1]
    told = described(module).get(weight)
    signal = told.own if told is not None and told.own else found.signal(index)
    if told is None:
        told = next(iter(found.above(index)), Description("Backprop"))
    if not parameter.requires_grad:
        signal = "none (frozen)"
    carried = told.carries and _is_carried(module, weight, parameter)
    return Row(full, told.rule, signal, told.feedback, told.kind, told.seed, carried)


def _is_carried(module: nn.Module, weight: str, parameter: nn.Parameter) -> bool:
    """Say whether backprop would multiply a cotangent by this parameter, as a matrix."""
    if isinstance(module, NO_MATRICES) or "bias" in weight:
        return False
    if is_lazy(parameter):  # it has no shape yet, and will have a matrix's
        return True
    if parameter.dim() < 2:
        return False
    if "weight" not in weight and parameter.shape[0] == 1:
        return False
    # of several that make up one weight, the largest stands for it
    return parameter is parts_of(module, weight)[0]
