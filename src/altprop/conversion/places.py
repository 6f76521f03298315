"""Where learning rules can go in a model.

`Places` finds the linear maps and blocks and changes nothing: problems are collected, so that one
error can tell them all. A path here is that of the model as it was before `torch.compile` wrapped
it or its parts, and a module that has several is known by each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from altprop.conversion.attention import AttentionRole, EncoderLayerRole
from altprop.conversion.layers import BACKPROP, row_of
from altprop.conversion.record import record_of
from altprop.conversion.replaced import is_compiled, uncompiled, unwrapped
from altprop.conversion.roles import Role, TapRole
from altprop.conversion.sites import LinearMap
from altprop.errors import Problems, suggest

Needs = list[tuple[nn.Module, type[Role]]]


@dataclass(eq=False)
class Place:
    """A linear map or a module's output, where a rule can be put."""

    path: str
    module: nn.Module
    weight: Tensor
    """A tensor of the module, for dtype and device; of a map, its weight."""
    rows: int
    columns: int = 0
    stored: LinearMap | None = None
    """How the module keeps the map, if it is one."""
    role: type[Role] = TapRole
    needs: Needs = field(default_factory=list)
    """Modules around the map that must get forwards of their own."""
    refusal: str = ""
    others: tuple[str, ...] = ()
    """Further paths of the same place, in a model that holds its module several times."""

    def matched(self, pattern: str) -> bool:
        """Say whether a pattern names the place, or anything above it, by any of its paths."""
        return any(matches(pattern, path) for path in (self.path, *self.others))

    def inside(self, block: str) -> bool:
        """Say whether any path of the place is that of a block or leads into it."""
        return any(f"{path}.".startswith(f"{block}.") for path in (self.path, *self.others))

    @property
    def is_map(self) -> bool:
        return self.stored is not None

    @property
    def key(self) -> str:
        """By what its module's record knows it."""
        return "" if self.stored is None else self.stored.key

    @property
    def suffix(self) -> str:
        """What is added to the feedback's name, where a module holds several maps."""
        return f"_{self.stored.name}" if self.stored is not None and self.stored.name else ""


def matches(pattern: str, path: str) -> bool:
    """Say whether a pattern names `path` or anything above it."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))


def named(path: str) -> str:
    return path or "the model itself"


def unready(parts: Iterable[nn.Module], weights: Iterable[Tensor]) -> str:
    """Say what the weights lack, if anything, for a feedback to be drawn for them."""
    if any(isinstance(part, LazyModuleMixin) for part in parts):
        return "lazy, without a shape yet: run one batch through the model, then convert"
    if any(weight.is_meta for weight in weights):
        return "on the meta device, without values: materialise the model, then convert"
    return ""


def real(tensors: Iterable[Tensor]) -> Tensor:
    """Return the first tensor of real numbers, for the dtype and device of a feedback."""
    tensors = list(tensors)
    return next((t for t in tensors if t.is_floating_point()), tensors[0])


class Places:
    """All linear maps of a model and its output; problems with the model as a whole."""

    def __init__(self, model: nn.Module, output: str | None, problems: Problems) -> None:
        self.model = model = unwrapped(model)
        self.problems = problems
        self.paths: dict[nn.Module, list[str]] = {}
        """All paths of every module."""
        for path, module in model.named_modules(remove_duplicate=False):
            if not is_compiled(module):
                self.paths.setdefault(module, []).append(uncompiled(path))
        # every module once, by its first path
        self.modules = {paths[0]: module for module, paths in self.paths.items()}
        self.maps: list[Place] = []
        self.output: Place | None = None
        self.output_path = None if output is None else uncompiled(output)
        self.claimed: dict[tuple[int, str], str] = {}
        self.kept: set[Place] = set()
        converted = [path for path, m in model.named_modules() if record_of(m) is not None]
        if converted:
            where = f"it is already converted ({named(converted[0])}, …)"
            problems.append(("", f"{where}: write revert(model) first"))
            return
        if any(type(m).__name__.startswith("FSDP") for m in model.modules()):
            problems.append(("", "it is already sharded: convert before fully_shard"))
            return
        self._find()
        if self.output_path is not None:
            self.output = self._resolve(self.output_path)

    def _find(self) -> None:
        for path, module in self.modules.items():
            row, unknown = row_of(module)
            if row is None:
                continue
            around = self.above(path) + [module]
            needs, inside = self.surroundings(around)
            if len(around) > 1 and isinstance(around[-2], nn.MultiheadAttention):
                unknown = unknown or row_of(around[-2])[1]  # who may not call it
            for stored in row.maps(module):
                W: Any = getattr(module, stored.weight, None)
                weights = [W] if isinstance(W, Tensor) else []
                refusal = unready([module], weights) or unknown or row.why_not(module) or inside
                flat = not weights or is_lazy(W) or W.dim() != 2
                rows, columns = (0, 0) if flat else stored.of(module)[0].shape
                if not refusal and W.is_complex():
                    refusal = f"its weight is complex, and feedback is real: {BACKPROP}"
                where, *others = (f"{p}.{stored.name}".strip(".") for p in self.paths[module])
                self.maps.append(
                    Place(
                        where, module, W, rows, columns, stored, row.role, needs, refusal,
                        tuple(others),
                    )
                )  # fmt: skip

    def above(self, path: str) -> list[nn.Module]:
        """Return the modules that hold the one at `path`, the model first."""
        parts = path.split(".") if path else []
        return [self.modules[".".join(parts[:n])] for n in range(len(parts))]

    def surroundings(self, around: list[nn.Module]) -> tuple[Needs, str]:
        """Return which of these modules need forwards of their own, and why none may hold a rule,
        if so."""
        needs: Needs = []
        refusal = ""
        for module in around:
            if getattr(module, "opaque_to_rules", False):
                refusal = (
                    f"it is inside a {type(module).__name__}, whose adjoint a rule within would "
                    "falsify: give the Equilibrium an estimator instead"
                )
            if isinstance(module, nn.MultiheadAttention):
                needs.append((module, AttentionRole))
            elif isinstance(module, nn.TransformerEncoderLayer):
                if type(module).forward is nn.TransformerEncoderLayer.forward:
                    needs.append((module, EncoderLayerRole))
        return needs, refusal

    def _resolve(self, output: str) -> Place | None:
        known = [place.path for place in self.maps if place.key == "weight"]
        found = next((p for p in self.maps if output in (p.path, *p.others)), None)
        if found is None or found.key != "weight":
            wanted = f"not the path of a linear map: {suggest(output, known)}"
            self.problems.append(("", f"output={output!r} is {wanted}"))
        elif lacking := unready([found.module], []):
            self.problems.append((output, lacking))
        return found

    def within(self, path: str) -> list[Place]:
        """Return the maps in or below a module."""
        if not path:
            return list(self.maps)
        return [p for p in self.maps if p.path == path or p.path.startswith(path + ".")]

    def guess_blocks(self) -> list[tuple[str, nn.Module]]:
        """Return the members of the outermost lists of modules that hold linear maps."""
        for kind in (nn.ModuleList, nn.Sequential):
            found: list[tuple[str, nn.Module]] = []
            inside: list[str] = []
            for path, module in self.modules.items():
                if not isinstance(module, kind) or any(path.startswith(p) for p in inside):
                    continue
                members = [
                    (f"{path}.{n}".lstrip("."), unwrapped(m)) for n, m in module.named_children()
                ]
                members = [m for m in members if self.within(m[0]) and not self._holds_output(m[0])]
                if kind is nn.Sequential:  # a bare linear map in a chain is no block
                    members = [m for m in members if list(m[1].children())]
                if members:
                    inside.append(path + "." if path else "")
                    found += members
            if found:
                return found
        return []

    def _holds_output(self, path: str) -> bool:
        return self.output is not None and self.output in self.within(path)
