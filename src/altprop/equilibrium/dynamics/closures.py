"""What a function uses of its surroundings: modules and parameters that were not given to it.

Its code says which names it loads and which attributes of these, its closure and globals what they
are. Functions, methods, partial ones, containers and objects among them are followed in turn, until
a bound. All is looked up and nothing executed: no property, no `__getattr__`.
"""

from __future__ import annotations

import dis
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

Found = Iterator[tuple[str, nn.Module | nn.Parameter]]

_MOST = 10_000  # values that are looked at
_NOTHING = object()
_INERT = (str, bytes, int, float, complex, type, type(None), ModuleType)
_LISTS: tuple[Any, ...] = (list, tuple, deque, set, frozenset)


def held_by(force: Callable[..., Any]) -> Found:
    """Yield the modules and parameters that a callable uses, each once, as it would write them.

    Of a module, itself, and what its own forward pass uses beside it.
    """
    walk = _Walk()
    yield from walk.value("force", force)
    if isinstance(force, nn.Module):
        yield from walk.attributes("force", force, ["forward"])


class _Walk:
    def __init__(self) -> None:
        self._left = _MOST
        self._seen: dict[Any, Any] = {}  # by identity, which lasts as long as what is kept here

    def _is_new(self, *values: Any) -> bool:
        key = tuple(map(id, values))
        if key in self._seen:
            return False
        self._seen[key] = values
        return True

    def value(self, name: str, value: Any, inside: bool = False) -> Found:
        """Yield what a value holds.

        **Arguments:** `inside`, whether it is in an object that is used as a whole; then objects
        in it are not looked into, for they lead anywhere.
        """
        self._left -= 1
        if isinstance(value, _INERT) or self._left < 0 or not self._is_new(value):
            return
        called = inspect.getattr_static(type(value), "__call__", None)
        if isinstance(value, nn.Module | nn.Parameter):
            yield name, value
        elif isinstance(value, FunctionType):
            yield from self.function(value)
        elif isinstance(value, MethodType):
            yield from self.method(f"{name}.__self__", value)
        elif isinstance(called, FunctionType):
            yield from self.method(name, MethodType(called, value))
        elif not isinstance(value, Tensor):
            for within, one, deeper in islice(_parts(name, value), self._left):
                if deeper or not inside:
                    yield from self.value(within, one, inside or not deeper)

    def attributes(self, name: str, value: Any, chain: list[str]) -> Found:
        """Yield what attributes of attributes of a value hold, as far as they can be looked up."""
        for attribute in chain:
            found = _attribute(value, attribute)
            if isinstance(found, MethodType) and found.__self__ is value:
                yield from self.method(name, found)
                return
            if found is _NOTHING:
                break
            name, value = f"{name}.{attribute}", found
        yield from self.value(name, value)

    def method(self, owner: str, bound: MethodType) -> Found:
        """Yield what a method uses, of its object, which is called `owner`, what it reads."""
        if isinstance(bound.__func__, FunctionType) and not _is_torchs(bound.__func__):
            yield from self.function(bound.__func__, owner, bound.__self__)
        else:
            yield from self.value(owner, bound.__self__)

    def function(self, function: FunctionType, owner: str = "", first: Any = _NOTHING) -> Found:
        """Yield what a function uses.

        **Arguments:** `first`, its first argument where it is a method, and `owner`, its name.
        """
        self._left -= 1
        if self._left < 0 or not self._is_new(function, first):
            return
        code, known = function.__code__, _closure(function)
        if first is not _NOTHING and not code.co_argcount:  # a decorator hands its arguments on
            for _, value in (*known.values(), ("", vars(function).get("__wrapped__"))):
                if isinstance(value, FunctionType):
                    yield from self.function(value, owner, first)
        if _is_torchs(function):  # torch's decorators hold a user's function
            for name, value in known.values():
                yield from self.value(name, value)
            return
        for name, value in _defaults(function):
            yield from self.value(name, value)
        if first is not _NOTHING and code.co_argcount:
            known[code.co_varnames[0]] = owner, first
        yield from self.code(code, known, function.__globals__)

    def code(
        self, code: CodeType, known: dict[str, tuple[str, Any]], around: dict[str, Any]
    ) -> Found:
        """Yield what a code uses, and the codes of functions that it makes.

        **Arguments:** `known`, what its own names are called elsewhere and their values, where
        these are known; `around`, its globals.
        """
        for is_global, name, chain in _loads(code):
            if not is_global and name in known:
                yield from self.attributes(*known[name], chain)
            elif is_global and name in around:
                yield from self.attributes(name, around[name], chain)
        for made in code.co_consts:
            if isinstance(made, CodeType):
                handed = {name: known[name] for name in made.co_freevars if name in known}
                yield from self.code(made, handed, around)


def _loads(code: CodeType) -> Iterator[tuple[bool, str, list[str]]]:
    """Yield the names that a code loads: whether as a global, and the attributes read of it."""
    now: tuple[bool, str, list[str]] | None = None
    cells = {*code.co_cellvars, *code.co_freevars}  # which a closure is made of by LOAD_FAST
    for instruction in dis.get_instructions(code):
        op, given = instruction.opname, instruction.argval
        if op in ("EXTENDED_ARG", "CACHE", "NOP", "COPY"):  # `a.b += 1` copies `a`
            continue
        if now is not None and op in ("LOAD_ATTR", "LOAD_METHOD"):
            now[2].append(given)
            continue
        if now is not None and op not in ("STORE_ATTR", "DELETE_ATTR"):  # which read nothing of it
            yield now
        now = None
        if op == "LOAD_GLOBAL" or "LOAD_FAST" in op or "LOAD_DEREF" in op:
            *more, last = given if isinstance(given, tuple) else (given,)  # some load two at once
            for name in set(more) - cells:
                yield False, name, []
            if "LOAD_FAST" not in op or last not in cells:
                now = op == "LOAD_GLOBAL", last, []
    if now is not None:
        yield now


def _closure(function: FunctionType) -> dict[str, tuple[str, Any]]:
    """Return the variables of enclosing functions that a function uses, but for unset ones."""
    known = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            known[name] = name, cell.cell_contents
        except ValueError:
            continue
    return known


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code, given = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    yield from zip(names, given, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute if it can be looked up, methods and properties bound to their object."""
    if name == "__class__":
        return type(value)
    if isinstance(value, nn.Module):
        for kind in ("_parameters", "_modules", "_buffers"):
            if name in (own := _own(value).get(kind) or {}):
                return own[name]
    found = inspect.getattr_static(value, name, _NOTHING)
    if isinstance(value, ModuleType) or name in _own(value):
        return found
    if isinstance(found, MemberDescriptorType) and not isinstance(value, type):  # of __slots__
        try:
            return found.__get__(value)
        except AttributeError:
            return _NOTHING
    if isinstance(found, staticmethod):
        return found.__func__
    if isinstance(found, classmethod):
        return MethodType(found.__func__, value if isinstance(value, type) else type(value))
    found = found.fget if isinstance(found, property) else found
    if isinstance(found, FunctionType):
        if isinstance(value, type):
            return found
        return _NOTHING if _is_torchs(found) else MethodType(found, value)
    # what else computes its value is not asked: the object itself is looked at
    return _NOTHING if hasattr(type(found), "__get__") else found


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield what is in a container, a partial function or another object.

    With each, its name, and whether it is to be had from what is in an object too.
    """
    if isinstance(value, partial):
        for part in ("func", "args", "keywords"):
            yield f"{name}.{part}", getattr(value, part), True
        return
    if isinstance(value, dict):
        for key, one in dict.items(value):
            yield f"{name}[{key!r}]", one, True
        return
    for kind in _LISTS:
        if isinstance(value, kind):
            for i, one in enumerate(kind.__iter__(value)):
                yield f"{name}[{i}]", one, True
            return
    own = _own(value)
    if "__wrapped__" in own:  # functools.cache
        yield f"{name}.__wrapped__", own["__wrapped__"], True
        return
    for attribute, one in own.items():
        yield f"{name}.{attribute}", one, False


def _own(value: Any) -> dict[str, Any]:
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return own if isinstance(own, dict) else {}


def _is_torchs(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"
