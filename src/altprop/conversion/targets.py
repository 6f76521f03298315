"""A dry run of `convert`: which places a rule would take, which not, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from altprop.conversion.convert import planned
from altprop.conversion.explain import aligned
from altprop.conversion.layers import others
from altprop.conversion.places import Place, Places, named
from altprop.conversion.planner import Planner
from altprop.conversion.replaced import uncompiled
from altprop.errors import Problems, told
from altprop.rule import AbstractRule


@dataclass(frozen=True)
class Target:
    """A linear map, a block, or another layer that holds a matrix.

    `path`; `kind`, the class of its module; `rule`, the name of what would take it, or nothing;
    `why`, if nothing, why not.
    """

    path: str
    kind: str
    rule: str = ""
    why: str = ""


@dataclass(frozen=True)
class Targets:
    """What `targets` returns: `rows`, one for each place, and `problems`, a line for each thing
    for which `convert` would refuse the model."""

    rows: tuple[Target, ...]
    problems: tuple[str, ...]

    @property
    def taken(self) -> tuple[Target, ...]:
        """The places that a rule would take."""
        return tuple(row for row in self.rows if row.rule)

    def __str__(self) -> str:
        head = ("place", "kind", "rule", "why not")
        lines = [head, *((row.path, row.kind, row.rule, row.why) for row in self.rows)]
        refused = ["convert would refuse this model:", *(f"  - {line}" for line in self.problems)]
        return "\n".join([*aligned(lines), *(refused if self.problems else [])])


def targets(
    model: nn.Module,
    rule: AbstractRule | Mapping[str, AbstractRule],
    *,
    output: str | None = None,
) -> Targets:
    """Say what `convert` with these arguments would take, without changing anything.

    Parameters that are no matrices (biases alone, norms, embeddings) are nobody's targets; what
    reaches them says `explain`, of a converted model.

    **Arguments:** `model`; `rule`, a rule or rules by name pattern; `output`, the path of the
    module that makes the logits, for a broadcast rule: all as for `convert`.
    **Raises:** `ConfigError` for a rule that is none.
    """
    problems: Problems = []
    places, planners = planned(model, rule, output, problems)
    taken = _taken(places, planners)
    wholes = {path: name for (path, is_map), (name, _) in taken.items() if not is_map}
    reasons: dict[str, str] = {}
    for path, why in problems:
        reasons.setdefault(path, why)
    found = {key: Target(named(key[0]), kind, name) for key, (name, kind) in taken.items()}
    for place in places.maps:
        why = _why_not(place, places, planners, wholes, reasons)
        row = Target(named(place.path), type(place.module).__name__, why=why)
        found.setdefault((place.path, True), row)
    rows = {path: index for index, path in enumerate(places.modules)}
    maps = [place.module for place in places.maps]
    for path, module in others(places.model, maps, [""]) if planners else []:
        kind = type(module).__name__
        why = f"no linear map that is known: register_layer({kind}) if it is one"
        found.setdefault((uncompiled(path), True), Target(uncompiled(path), kind, why=why))
    order = sorted(found, key=lambda key: rows.get(key[0], rows.get(key[0].rpartition(".")[0], 0)))
    return Targets(tuple(found[key] for key in order), tuple(told(problems)))


def _taken(places: Places, planners: list[Planner]) -> dict[tuple[str, bool], tuple[str, str]]:
    """Return, by path and whether it is a map, the rule that would take a place, and its kind."""
    taken = {}
    for planner in planners:
        name = type(planner.rule).__name__
        for place in [*planner.transports, *(p for r in planner.taps for p in r.places)]:
            taken[place.path, place.is_map] = (name, type(place.module).__name__)
        for path, block in planner.levels:
            taken[path, False] = (name, type(block).__name__)
    return taken


def _why_not(
    place: Place,
    places: Places,
    planners: list[Planner],
    wholes: Mapping[str, str],
    reasons: Mapping[str, str],
) -> str:
    """Say why no rule would take a map."""
    if why := reasons.get(named(place.path)):
        return why
    for path, rule in wholes.items():
        if not path or place.path.startswith(path + "."):
            return f"part of {named(path)}, which {rule} takes as a whole"
    if place in places.kept:
        return "kept on backprop"
    if place is places.output:
        return "it makes the logits: its gradient is exact"
    patterns = [planner.pattern for planner in planners if planner.pattern is not None]
    if patterns and not any(place.matched(pattern) for pattern in patterns):
        return "no pattern matches it"
    return place.refusal or "no rule asks for it"
