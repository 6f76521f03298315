"""Where learning rules can go in a model, and what each rule asks for there.

`Places` finds the linear maps and blocks; a `Planner` is the `Scope` that one rule sees of them.
Neither changes anything: problems are collected, so that one error can tell them all.
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
from altprop.conversion.roles import Role, TapRole
from altprop.conversion.sites import LinearMap
from altprop.errors import Problems, suggest
from altprop.rule import AbstractBroadcast, AbstractRule

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


_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass
class TapRequest:
    """Taps that one error shall reach; `at` is the block that makes it, or none for the output."""

    places: list[Place]
    width: int
    at: Place | None


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
        self.model = model
        self.problems = problems
        self.maps: list[Place] = []
        self.output: Place | None = None
        self.output_path = output
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
        if output is not None:
            self.output = self._resolve(output)

    def _find(self) -> None:
        for path, module in self.model.named_modules():
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
                where = f"{path}.{stored.name}".strip(".")
                self.maps.append(
                    Place(where, module, W, rows, columns, stored, row.role, needs, refusal)
                )

    def above(self, path: str) -> list[nn.Module]:
        """Return the modules that hold the one at `path`, the model first."""
        parts = path.split(".") if path else []
        return [self.model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]

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
        found = next((place for place in self.maps if place.path == output), None)
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
            for path, module in self.model.named_modules():
                if not isinstance(module, kind) or any(path.startswith(p) for p in inside):
                    continue
                members = [(f"{path}.{n}".lstrip("."), m) for n, m in module.named_children()]
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


@dataclass
class Planner:
    """The `Scope` of one rule: the places that its pattern matches, and what it asks for."""

    places: Places
    rule: AbstractRule
    pattern: str | None
    earlier: list[tuple[str, AbstractRule]]
    transports: list[Place] = field(default_factory=list)
    taps: list[TapRequest] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Where all linear maps were asked for: paths of blocks, or nothing for the whole model."""
    levels: list[tuple[str, nn.Module]] = field(default_factory=list)
    """The blocks that shall be one equilibrium, in their order."""

    @property
    def _name(self) -> str:
        return type(self.rule).__name__

    def refuse(self, path: str, why: str) -> None:
        self.places.problems.append((named(path), why))

    def _left(self, path: str, kind: str) -> bool:
        return not any(kind in rule.takes and matches(p, path) for p, rule in self.earlier)

    def _nothing(self, what: str, known: Iterable[str], shadowed: bool) -> None:
        if self.pattern is None:
            self.refuse("", f"{self._name} finds no {what} in this model")
        elif shadowed:
            self.refuse(
                f"pattern {self.pattern!r}", f"every {what} it matches is taken by one before it"
            )
        else:
            self.refuse(
                f"pattern {self.pattern!r}",
                f"it matches no {what} for {self._name}: {suggest(self.pattern, known)}",
            )

    def maps(self) -> list[Place]:
        self.asked.append("")
        broadcast = isinstance(self.rule, AbstractBroadcast)
        known = [p for p in self.places.maps if not (broadcast and p is self.places.output)]
        matched = [p for p in known if self.pattern is None or matches(self.pattern, p.path)]
        left = [p for p in matched if self._left(p.path, "maps")]
        if not left and not ("blocks" in self.rule.takes and self._named_modules()):
            self._nothing("linear map", [p.path for p in known], bool(matched))
        return left

    def _named_modules(self, empty: bool = False) -> list[tuple[str, nn.Module]]:
        """Return the outermost modules, with parameters or `empty`, that the pattern matches."""
        assert self.pattern is not None
        found: list[tuple[str, nn.Module]] = []
        for path, module in self.places.model.named_modules():
            inside = any(path.startswith(above + ".") for above, _ in found)
            if path and not inside and fnmatchcase(path, self.pattern):
                if empty or next(module.parameters(), None) is not None:
                    found.append((path, module))
        return found

    def blocks(self) -> list[Place]:
        guess = self.places.guess_blocks()
        found = guess if self.pattern is None else self._named_modules()
        left = [(path, module) for path, module in found if self._left(path, "blocks")]
        if not left:
            if self.pattern is None and not found:
                self.refuse(
                    "",
                    f"{self._name} finds no list of blocks in this model: name them, as in "
                    "{'layers.*': " + self._name + "(...)}",
                )
            else:
                self._nothing("block", [path for path, _ in guess], bool(found))
        blocks = [self._block(path, module) for path, module in left]
        return [block for block in blocks if block is not None]

    def _block(self, path: str, module: nn.Module) -> Place | None:
        inside = self.places.within(path)
        if self.places.output is not None and self.places.output in inside:
            self.refuse(path, "this block holds the output, where the error is taken")
            return None
        width = getattr(self.rule, "width", None) or (inside[-1].rows if inside else None)
        if width is None:
            self.refuse(path, f"the width of its output is not known: {self._name}(features=...)")
            return None
        _, refusal = self.places.surroundings(self.places.above(path))
        refusal = refusal or unready(module.modules(), module.parameters())
        return Place(path, module, real(module.parameters()), width, refusal=refusal)

    def maps_in(self, block: Place) -> list[Place]:
        self.asked.append(block.path)
        return [p for p in self.places.within(block.path) if p not in self.places.kept]

    def sublayers(self, block: Place) -> list[Place]:
        module: Any = block.module
        names: tuple[str, ...] = getattr(module, "sublayer_outputs", ())
        if isinstance(module, nn.TransformerEncoderLayer) and not module.norm_first:
            names = ("norm1", "norm2")
        elif isinstance(module, nn.TransformerDecoderLayer) and not module.norm_first:
            names = ("norm1", "norm2", "norm3")
        if not names:
            self.refuse(
                block.path,
                f"no module of a {type(module).__name__} returns its summed residual, so it has "
                "no sublayer taps: use granularity='block', or set sublayer_outputs on the class",
            )
        found = []
        for name in names:
            child = module.get_submodule(name)
            weight, path = real([*child.parameters(), block.weight]), f"{block.path}.{name}"
            found.append(Place(path, child, weight, block.rows, refusal=block.refusal))
        return found

    def stack(self) -> None:
        modules = dict(self.places.model.named_modules())
        lists = [path for path, m in modules.items() if path and isinstance(m, _LISTS) and len(m)]
        if self.pattern is None:
            known = f"the model's are {', '.join(lists)}" if lists else "the model has none"
            write = f"convert(model, {{{(lists or ['blocks'])[0]!r}: {self._name}()}})"
            self.refuse("", f"{self._name} is for one list of blocks ({known}): write {write}")
            return
        chain = modules.get(self.pattern)
        if isinstance(chain, _LISTS):  # where a block may come twice
            inside = f"{self.pattern}." if self.pattern else ""
            found = [(inside + name, block) for name, block in chain._modules.items() if block]
        else:
            found = self._named_modules(empty=True)
        self.levels = [(path, block) for path, block in found if self._left(path, "blocks")]
        if not self.levels:
            self._nothing("list of blocks", lists, bool(found))
        for path, block in self.levels:
            if "forward" in block.__dict__:
                self.refuse(path, "somebody has replaced forward there already")
            if refusal := self.places.surroundings(self.places.above(path))[1]:
                self.refuse(path, refusal)

    def refuse_inside(self, levels: list[tuple[str, nn.Module]]) -> None:
        """Refuse what this rule asked for inside blocks of a stack."""
        within = {id(m): path for path, block in levels for m in block.modules()}
        ends = [self.places.output for request in self.taps if request.at is None]
        for place in [*self._own(), *(end for end in ends if end is not None)]:
            if id(place.module) in within:
                level = f"{within[id(place.module)]}, a level of a stack"
                self.refuse(place.path, f"it is in {level}, whose adjoint a rule would falsify")

    def _claim(self, place: Place) -> bool:
        if place.refusal:
            self.refuse(place.path, place.refusal)
            return False
        key = (id(place.module), place.key)
        other = self.places.claimed.setdefault(key, self._name)
        if other is not self._name or key in {(id(p.module), p.key) for p in self._own()}:
            self.refuse(place.path, f"{other} and {self._name} both claim it: give it one rule")
            return False
        return True

    def _own(self) -> list[Place]:
        return self.transports + [place for request in self.taps for place in request.places]

    def keep(self, place: Place) -> None:
        self.places.kept.add(place)

    def transport(self, place: Place) -> None:
        if self._claim(place):
            self.transports.append(place)

    def tap(self, places: Iterable[Place], *, at: Place | None = None) -> None:
        rule, output = self.rule, self.places.output
        assert isinstance(rule, AbstractBroadcast)
        if at is None and output is None:
            if self.places.output_path is None:
                last = self.places.maps[-1].path if self.places.maps else "head"
                self.refuse(
                    "",
                    f"{self._name} needs to know where the logits are made: write "
                    f"convert(model, rule, output={last!r})",
                )
            return
        if at is not None:
            width = at.rows
        else:
            assert output is not None
            width = output.columns if rule.at_head_input else output.rows
        request = TapRequest([place for place in places if self._claim(place)], width, at)
        if request.places:  # else every map of the block is kept
            self.taps.append(request)
