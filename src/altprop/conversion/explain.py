"""Which parameter gets which signal, and why: the table behind `print(explain(model))`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from altprop.conversion.convert import is_converted
from altprop.conversion.learned import learned_feedback
from altprop.conversion.sites import MapTap, OutputTap, TransportSite, sites_of
from altprop.conversion.stack import Level, level_of
from altprop.equilibrium.module import Equilibrium
from altprop.errors import RuleError
from altprop.rule import AbstractRule

_LOCAL = "local backprop inside a block"
_NOTHING = "none, but for paths around every map"
_STACK = "adjoint state of a stack"
_EQUILIBRIUM = "adjoint state of an equilibrium"
_Q = "q_proj_weight"  # where attention keeps its projections apart, one bias serves them all
# their weights are looked up or multiplied number by number, never as a matrix
_NO_MATRIX = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
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


@dataclass(frozen=True)
class Table:
    """What `explain` returns: `rows`, one per parameter, and `notes`."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = ("parameter", "rule", "signal", "feedback", "kind", "seed", "Wᵀ remains")
        lines = [head]
        for row in self.rows:
            shape = "×".join(map(str, row.feedback)) if row.feedback else "–"
            seed = "–" if row.seed is None else str(row.seed)
            remains = "yes" if row.transports else "–"
            lines.append(
                (row.parameter, row.rule, row.signal, shape, row.kind or "–", seed, remains)
            )
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        text.insert(1, "  ".join("─" * width for width in widths))
        return "\n".join([*text, *(f"note: {note}" for note in self.notes)])


class _Region(NamedTuple):
    """The module at `start` in the order of registration and all in it, up to `end`."""

    start: int
    end: int
    module: nn.Module

    def holds(self, index: int) -> bool:
        return self.start <= index <= self.end


class _Map:
    """A model's modules in the order of registration, and what its places send to those below."""

    def __init__(self, model: nn.Module) -> None:
        self.order = list(model.named_modules(remove_duplicate=False))
        self.index = {path: index for index, (path, _) in enumerate(self.order)}
        self.senders: list[tuple[int, str]] = []
        self.taps: list[_Region] = []
        self.solved: list[_Region] = []
        for index, (path, module) in enumerate(self.order):
            inside = f"{path}." if path else ""
            end = index
            while end + 1 < len(self.order) and self.order[end + 1][0].startswith(inside):
                end += 1
            region = _Region(index, end, module)
            for site in sites_of(module).values():
                if isinstance(site, TransportSite):
                    self.senders.append((index, site.rule.signal))
                elif isinstance(site, OutputTap):
                    self.taps.append(region)
                elif not site.channel.rule.sends:
                    self.senders.append((index, _NOTHING))
            if level_of(module) is not None or isinstance(module, Equilibrium):
                self.solved.append(region)
                self.senders.append((index, _STACK if level_of(module) else _EQUILIBRIUM))

    def tap_above(self, index: int) -> OutputTap | None:
        """Return the innermost tap whose module holds the module at `index`."""
        held = [region.module for region in self.taps if region.holds(index)]
        return held[-1].__dict__["_altprop_tap"] if held else None

    def estimator(self, index: int) -> AbstractRule | None:
        """Return the estimator of the equilibrium that holds the module at `index`, if one does."""
        solved = self.solved_above(index)
        if solved is None or isinstance(solved, Equilibrium):
            return None if solved is None else solved.estimator
        return cast(Level, level_of(solved)).stack.equilibrium.estimator

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

    def solved_above(self, index: int) -> nn.Module | None:
        """Return the block of a stack, or the `Equilibrium`, that holds the module at `index`."""
        held = [region.module for region in self.solved if region.holds(index)]
        return held[0] if held else None

    def signal(self, index: int) -> str:
        """Say what the module at `index` receives from what was registered after it."""
        ends = [region.end for region in self.taps if region.end >= index]
        cut = min(ends, default=len(self.order))
        signals = {text for at, text in self.senders if index < at <= cut}
        if ends:
            signals.add(_LOCAL)
        solved = self.solved_above(index)
        level = None if solved is None else level_of(solved)
        if level is not None:
            signals = signals - {_STACK} | {level.signal}
        elif solved is not None:
            signals.add(_EQUILIBRIUM)
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


def explain(model: nn.Module) -> Table:
    """Return, for each parameter of `model`, the rule and the signal that reaches it.

    `model` may be a part of what was converted; then only the places in it are told of. The order
    in which modules were registered is taken for the order in which they run: what comes after the
    last place of a rule still receives exact gradients. Norms are the exception, for torch's own
    and Hugging Face's blocks register last what runs first: of what follows the places of its own
    block but holds none, both signals are told, and that the order is unknown.

    Whether a transpose remains is read off the modules as they are. A matrix in a module of an
    unknown kind counts as one that a cotangent is multiplied by, unless its first axis is 1, as
    that of a table of positions.

    **Raises:** `RuleError` if no rule, no `Equilibrium` and no converted stack is in `model`.
    """
    modules = list(model.modules())
    if not any(is_converted(m) or sites_of(m) or isinstance(m, Equilibrium) for m in modules):
        raise RuleError(
            f"this {type(model).__name__} was not converted: call convert(model, rule), or explain "
            "the whole model that it is a part of"
        )
    found = _Map(model)
    rows: dict[str, Row] = {}
    first: dict[int, str] = {}
    for index, (_, module) in enumerate(found.order):
        for name, parameter in module.named_parameters(recurse=False):
            if name in getattr(module, "_altprop_names", ()):
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
        notes.append(f"{len(kept)} weights are still transported exactly")
    return Table(tuple(rows.values()), tuple(notes))


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
    sites = sites_of(module)
    keys = (weight, weight.replace("bias", "weight"), weight.replace("in_proj_bias", _Q))
    site = next((sites[key] for key in keys if key in sites), None)
    holder = found.tap_above(index) if site is None else site
    transports = _is_carried(module, weight, parameter)
    rule, signal = "Backprop", found.signal(index)
    shape, kind, seed = None, "", None
    if isinstance(holder, TransportSite):
        B = getattr(module, holder.name) if holder.name else None
        rule, transports = type(holder.rule).__name__, False
        shape = None if B is None else tuple(B.shape)
        kind = "learned" if holder.rule.learned else "fixed" if B is not None else ""
        kind = kind or ("drawn at every pass" if holder.noisy else "from the weight")
        seed = holder.seed if B is not None or holder.noisy else None
    elif holder is not None:
        channel = holder.channel
        rule, seed = type(channel.rule).__name__, channel.seed
        shape = (holder.site.rows, holder.site.columns)
        kind = "learned" if channel.rule.learned else "fixed"
        if channel.shared:
            kind += ", shared"
        if isinstance(holder, MapTap):
            signal, transports = channel.rule.signal, channel.rule.sends and transports
    elif (estimator := found.estimator(index)) is not None:
        rule = type(estimator).__name__
    if not parameter.requires_grad:
        signal = "none (frozen)"
    return Row(full, rule, signal, shape, kind, seed, transports)


def _is_carried(module: nn.Module, weight: str, parameter: nn.Parameter) -> bool:
    """Say whether backprop would multiply a cotangent by this parameter, as a matrix."""
    if isinstance(module, _NO_MATRIX) or "bias" in weight:
        return False
    if is_lazy(parameter):  # it has no shape yet, and will have a matrix's
        return True
    if parameter.dim() < 2:
        return False
    if "weight" not in weight and parameter.shape[0] == 1:
        return False
    # of several that make up one weight, the largest stands for it
    return parameter is max(_parts(module, weight), key=Tensor.numel)


def _parts(module: nn.Module, weight: str) -> list[nn.Parameter]:
    """Return the parameters that a weight is made of: itself, or those of its parametrisation."""
    if is_parametrized(module, weight):
        return list(cast(nn.ModuleDict, module.parametrizations)[weight].parameters())
    own = dict(module.named_parameters(recurse=False))
    return [own[weight]] if weight in own else [own[n] for n in own if n.startswith(f"{weight}_")]
