"""Which parameter gets which signal, and why: the table behind `print(explain(model))`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from altprop.converting import conversions
from altprop.equilibrium.stack import StackRow, explain_stack
from altprop.errors import RuleError
from altprop.learned import learned_feedback
from altprop.rule import AbstractBroadcast, AbstractTransport
from altprop.sites import MapTap, OutputTap, Role, TransportSite


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
    """Whether the backward pass still multiplies by this weight's exact transpose."""


@dataclass(frozen=True)
class Table:
    """What `explain` returns: `rows`, one per parameter, and `notes`."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for JSON."""
        return [asdict(row) for row in self.rows]

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


def _stack_row(row: StackRow) -> Row:
    return Row(row.name, row.rule, row.signal, None, "", None, transports=True)


def explain(model: nn.Module) -> Table:
    """Return, for each parameter, the rule and the signal that reaches it.

    The order in which modules were registered is taken for the order in which they run: what comes
    after the last place of a rule still receives exact gradients.

    **Raises:** `RuleError` if neither the model nor any part of it was converted.
    """
    found = list(conversions(model))
    stacked = explain_stack(model)
    if not found and stacked:
        return Table(tuple(_stack_row(row) for row in stacked), ())
    if not found:
        raise RuleError(f"this {type(model).__name__} was not converted: call convert(model, rule)")
    rows: dict[str, Row] = {}
    seen: dict[int, str] = {}
    order = list(model.named_modules(remove_duplicate=False))
    sites = {id(m): _sites(m) for _, m in order}
    after = [
        i
        for i, (_, m) in enumerate(order)
        if any(_changes(s) for s in sites.get(id(m), {}).values())
    ]
    last = after[-1] if after else -1
    for index, (path, module) in enumerate(order):
        feedback_names = getattr(module, "_altprop_names", ()) if isinstance(module, Role) else ()
        for name, parameter in module.named_parameters(recurse=False):
            if name in feedback_names:
                continue
            row = _row(
                f"{path}.{name}".lstrip("."), name, parameter, module, path, index, last, found
            )
            first = seen.setdefault(id(parameter), row.parameter)
            if first != row.parameter and rows[first].signal != row.signal:  # tied: both arrive
                old = rows[first]
                rows[first] = Row(
                    old.parameter, old.rule if old.feedback else row.rule,
                    f"{old.signal} + {row.signal} (tied)", old.feedback or row.feedback,
                    old.kind or row.kind, old.seed, old.transports or row.transports,
                )  # fmt: skip
            elif first == row.parameter:
                rows[first] = row
    for stack_row in stacked:
        if stack_row.level is not None:
            rows[stack_row.name] = _stack_row(stack_row)
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


def _sites(module: nn.Module) -> dict[str, Any]:
    sites = dict(module.__dict__.get("_altprop_maps", {}))
    if "_altprop_tap" in module.__dict__:
        sites[""] = module.__dict__["_altprop_tap"]
    return sites


def _changes(site: Any) -> bool:
    """Say whether what lies below this place receives another signal because of it."""
    return isinstance(site, (TransportSite, OutputTap)) or not site.channel.rule.sends


def _below(module: nn.Module) -> list[str]:
    """Return the signals that the places in a module send to what lies below them."""
    signals = []
    for inner in module.modules():
        for site in _sites(inner).values():
            if isinstance(site, TransportSite):
                signals.append(site.rule.signal)
            elif isinstance(site, MapTap) and not site.channel.rule.sends:
                signals.append("none, but for paths around every map")
    return signals


def _row(
    full: str, name: str, parameter: nn.Parameter, module: nn.Module, path: str, index: int,
    last: int, found: list[Any],
) -> Row:  # fmt: skip
    key = name.replace("_bias", "_weight") if name.startswith("in_proj") else "weight"
    own = _sites(module)
    site = own.get(name) or (own.get(key) if name in ("bias", "in_proj_bias") else None)
    root_path, root, record = next(
        (f for f in reversed(found) if not f[0] or path == f[0] or path.startswith(f[0] + ".")),
        found[0],
    )
    parts = path.split(".")
    tapped = _tap_above(root, root_path, parts)
    if tapped is not None:
        inside = "local backprop inside a block"
        blocks = sorted(set(_below(_get(root, root_path, tapped.site.path))))
        below = inside if not blocks else f"{inside}, {' and '.join(blocks)}"
    elif index > last:
        below = "exact"
    else:
        signals = sorted(set(_below(root)))
        taps = any(isinstance(s, OutputTap) for m in root.modules() for s in _sites(m).values())
        if taps:
            signals.append("local backprop inside a block")
        below = " and ".join(signals) or "exact"
    rule = record.rules.get(path)
    shape, kind, seed = None, "", None
    signal = below
    transports = parameter.dim() == 2 and name.endswith("weight") and isinstance(module, nn.Linear)
    holder = site if site is not None else tapped
    if isinstance(site, TransportSite):
        rule = site.rule
        seed, transports = site.seed, False
        signal = "exact" if index >= last and tapped is None else below
        B = getattr(module, site.name) if site.name else None
        shape = None if B is None else tuple(B.shape)
        kind = "learned" if site.rule.learned else "fixed" if B is not None else ""
        kind = kind or ("drawn at every pass" if site.rule.noisy else "from the weight")
        seed = seed if B is not None or site.rule.noisy else None
    elif isinstance(holder, (MapTap, OutputTap)):
        rule = holder.channel.rule
        seed = holder.channel.seed
        shape = (holder.site.rows, holder.site.columns)
        kind = "learned" if rule.learned else "fixed"
        if holder.channel.shared:
            kind += ", shared"
        if isinstance(holder, MapTap):
            signal, transports = rule.signal, rule.sends and parameter.dim() == 2
    if not parameter.requires_grad:
        signal = "none (frozen)"
    if isinstance(rule, (AbstractTransport, AbstractBroadcast)):
        text = type(rule).__name__
    else:
        text = "Backprop"
    return Row(full, text, signal, shape, kind, seed, bool(transports))


def _get(root: nn.Module, root_path: str, path: str) -> nn.Module:
    return root.get_submodule(path)


def _tap_above(root: nn.Module, root_path: str, parts: list[str]) -> OutputTap | None:
    """Return the innermost tap whose module holds the module at `parts`."""
    skip = len(root_path.split(".")) if root_path else 0
    inner = parts[skip:]
    for length in range(len(inner), 0, -1):
        module = root.get_submodule(".".join(inner[:length]))
        tap = module.__dict__.get("_altprop_tap")
        if tap is not None:
            return tap
    return None
