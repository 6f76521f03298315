"""What each rule asks for in a model: the `Scope` that one rule sees of its places.

A `Planner` changes nothing: problems are collected, so that one error can tell them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from altprop.conversion.places import Place, Places, matches, named, real, unready
from altprop.conversion.replaced import REPLACED, is_replaced, unwrapped
from altprop.errors import suggest
from altprop.rule import AbstractBroadcast, AbstractRule

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass
class TapRequest:
    """Taps that one error shall reach; `at` is the block that makes it, or none for the output."""

    places: list[Place]
    width: int
    at: Place | None


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

    def _left(self, paths: Iterable[str], kind: str) -> bool:
        """Say whether no earlier rule takes what has these paths."""
        rules = [pattern for pattern, rule in self.earlier if kind in rule.takes]
        return not any(matches(pattern, path) for pattern in rules for path in paths)

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
        matched = [p for p in known if self.pattern is None or p.matched(self.pattern)]
        left = [p for p in matched if self._left((p.path, *p.others), "maps")]
        if not left and not ("blocks" in self.rule.takes and self._named_modules()):
            self._nothing("linear map", [p.path for p in known], bool(matched))
        return left

    def _named_modules(self, empty: bool = False) -> list[tuple[str, nn.Module]]:
        """Return the outermost modules, with parameters or `empty`, that the pattern matches."""
        assert self.pattern is not None
        found: list[tuple[str, nn.Module]] = []
        lists: list[str] = []
        for path, module in self.places.modules.items():
            inside = any(path.startswith(above + ".") for above, _ in found)
            named = any(fnmatchcase(p, self.pattern) for p in self.places.paths[module])
            if path and not inside and (named or path.rpartition(".")[0] in lists):
                if isinstance(module, nn.ModuleList) and not empty:
                    lists.append(path)  # nobody calls it: its members are meant
                elif empty or next(module.parameters(), None) is not None:
                    found.append((path, module))
        return found

    def blocks(self) -> list[Place]:
        guess = self.places.guess_blocks()
        found = guess if self.pattern is None else self._named_modules()
        left = [(path, m) for path, m in found if self._left(self.places.paths[m], "blocks")]
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
        for place in self.places.maps:
            inside = place.inside(block.path)
            twice = [path for path in self.asked if inside and place.inside(path)]
            if twice and place not in self.places.kept:
                self.refuse(
                    place.path,
                    f"it is in {twice[0]} and in {block.path}, of which each makes an error of its "
                    "own: keep it on backprop by a pattern of its own, with Backprop(), put first",
                )
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
            child = unwrapped(module.get_submodule(name))
            weight, path = real([*child.parameters(), block.weight]), f"{block.path}.{name}"
            found.append(Place(path, child, weight, block.rows, refusal=block.refusal))
        return found

    def stack(self) -> None:
        modules = self.places.modules
        lists = [path for path, m in modules.items() if path and isinstance(m, _LISTS) and len(m)]
        if self.pattern is None:
            known = f"the model's are {', '.join(lists)}" if lists else "the model has none"
            write = f"convert(model, {{{(lists or ['blocks'])[0]!r}: {self._name}()}})"
            self.refuse("", f"{self._name} is for one list of blocks ({known}): write {write}")
            return
        chain = modules.get(self.pattern)
        if isinstance(chain, _LISTS):  # where a block may come twice
            inside = f"{self.pattern}." if self.pattern else ""
            blocks = ((n, unwrapped(m)) for n, m in chain._modules.items() if m is not None)
            found = [(inside + name, block) for name, block in blocks]
        else:
            found = self._named_modules(empty=True)
        self.levels = [(path, block) for path, block in found if self._left([path], "blocks")]
        if not self.levels:
            self._nothing("list of blocks", lists, bool(found))
        for path, block in self.levels:
            if is_replaced(block):
                self.refuse(path, REPLACED)
            if refusal := self.places.surroundings(self.places.above(path))[1]:
                self.refuse(path, refusal)

    def refuse_replaced(self) -> None:
        """Refuse modules that would get a role and already have a forward in its way."""
        takers: dict[nn.Module, str] = {}
        for place in self._own():
            for module in (place.module, *(module for module, _ in place.needs)):
                takers.setdefault(module, place.path)
        for request in self.taps:
            end = self.places.output if request.at is None else request.at
            if end is not None:
                takers.setdefault(end.module, end.path)
            if request.at is None:
                takers.setdefault(self.places.model, "")
        for module, path in takers.items():
            if is_replaced(module):
                self.refuse(path, REPLACED)

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
