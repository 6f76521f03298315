"""A value is written as in Python, such as `AEP(tol=1e-2, solver=GMRES())`, and read but never run.

A text may hold numbers, texts, lists, mappings and calls of known classes. It is parsed into a tree
of these, and only then is a class looked up by its name among those that are already there: the
exports of altprop, and the public classes of modules that are imported already (`--import`). So no
text can import or run anything, wherever it comes from.
"""

from __future__ import annotations

import ast
import math
import typing
import warnings
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

from altprop.errors import ConfigError, refusing, suggest
from altprop.lab.choices import (
    LISTS,
    at,
    base_of,
    choices,
    defaults_of,
    described,
    members_of,
    no_option,
    shown,
    types_of,
)
from altprop.reading import place as path_of

LONGEST = 10_000  # characters of a text
DEEPEST = 30  # calls and lists in one another
_BITS = 63  # of a whole number: torch takes no longer ones
_EXAMPLE = "such as AEP(tol=0.01, solver=GMRES())"
_WORDS = {"inf": math.inf, "nan": math.nan, "null": None, "true": True, "false": False}
_NO: Any = object()  # what does not fit


@dataclass(frozen=True)
class Call:
    """The call of a class that is still to be looked up; a bare name is one without arguments."""

    name: str
    args: tuple[Any, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.given.items())
        return f"{self.name}({', '.join([*map(repr, self.args), *given])})"


# From a text to a tree


def parse(text: str) -> Any:
    """Return what a text says as numbers, texts, lists, mappings and `Call`s; nothing is built.

    **Raises:** `ConfigError` for a text that says anything else, is too long or nests too deeply.
    """
    text = text.strip()
    if len(text) > LONGEST:
        raise ConfigError(f"a text of {len(text)} characters, expected at most {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash that escapes nothing
            node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", str(error)) or "nested too deeply"
        raise ConfigError(
            f"cannot read {shown(text)} ({why}): write it as in Python, {_EXAMPLE}"
        ) from None
    return _tree(node, text, 0)


def _tree(node: ast.AST, text: str, depth: int) -> Any:
    def inside(nodes: Iterable[ast.AST]) -> list[Any]:
        return [_tree(item, text, depth + 1) for item in nodes]

    if depth > DEEPEST:
        raise ConfigError(f"cannot read {shown(text)}: more than {DEEPEST} levels in one another")
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            (value,) = inside([operand])
            if type(value) in (int, float):
                return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return inside(items)
        case ast.Dict(keys=keys, values=items):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            if all(isinstance(name, str) for name in names):
                return _once(names, inside(items))
        case ast.Name(id=name):
            return _WORDS.get(name, Call(name))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            names = [keyword.arg for keyword in keywords]
            if None not in names:
                given = _once(names, inside(keyword.value for keyword in keywords))
                return Call(name, tuple(inside(args)), given)
    raise ConfigError(
        f"{shown(ast.get_source_segment(text, node))} cannot stand in a value: write numbers, "
        f"texts, lists, mappings and known classes by their names, {_EXAMPLE}"
    )


def _once(names: Sequence[Any], values: Sequence[Any]) -> dict[str, Any]:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{shown(name)} stands twice: keep one of them")
    return dict(zip(names, values, strict=True))


# From a tree to a value


def fit(hint: Any, value: Any, place: str) -> Any:
    """Return `value` as the type `hint` wants it, with every class that it calls built.

    A text stands for a number as well, because YAML reads `1e-3` as text.

    **Arguments:** `value`, plain data, a text or a tree of `parse`; `place`, its option, which
    errors name.

    **Raises:** `ConfigError` for a value that does not fit, or that a class refuses.
    """
    members, base = members_of(hint), base_of(hint)
    if base and isinstance(value, dict) and value.keys() - {"init_args"} == {"class_path"}:
        given = value.get("init_args", {})  # of a run before choices were written as in Python
        if isinstance(given, dict) and all(isinstance(name, str) for name in given):
            value = Call(str(value["class_path"]).rpartition(".")[2], (), given)
    for member in members:
        result = _as(member, value, place)
        if result is not _NO:
            return result
    if base and isinstance(value, Call):
        return _built(base, value, place)
    holds_others = base or any(typing.get_origin(m) in (*LISTS, dict, Mapping) for m in members)
    if isinstance(value, str) and holds_others:
        tree = at(place, lambda: parse(value))
        if tree != value:
            return fit(hint, tree, place)
    raise ConfigError(f"{place}: expected {described(hint)}, got {shown(value)}")


def _as(member: Any, value: Any, place: str) -> Any:
    """Return `value` as one `member` of a type, or `_NO`."""
    origin, args = typing.get_origin(member), typing.get_args(member)
    if origin is Literal:
        same = (a for a in args if a == value and type(a) is type(value) or str(a) == value)
        return next(same, _NO)
    if origin in LISTS and isinstance(value, (list, tuple)):
        wanted = args[:1] * len(value) if origin is not tuple or args[-1] is Ellipsis else args
        if len(wanted) != len(value):
            return _NO
        made = [fit(hint, item, place) for hint, item in zip(wanted, value, strict=True)]
        return made if origin is list else tuple(made)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{place}: the name {key} is no text: write '{key}'")
        return {key: fit(args[1], item, f"{place}.{key}") for key, item in value.items()}
    try:
        if isinstance(value, str) or (member is float and type(value) is int):
            value = _READ.get(member, lambda same: same)(value)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    except (ValueError, OverflowError, KeyError):
        return _NO
    if member is int and (type(value) is not int or value.bit_length() > _BITS):
        return _NO
    kind = origin or member
    return value if kind is Any or isinstance(kind, type) and isinstance(value, kind) else _NO


# what a text says where one of these is wanted; a shell leaves the ~ of --out=~/run to us
_READ: dict[Any, Callable[[Any], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    Path: path_of,
}


def _built(base: type, call: Call, place: str) -> Any:
    cls, given = looked_up(base, call, place)
    hints, defaults = types_of(cls), defaults_of(cls)
    values = {name: fit(hints[name], value, f"{place}.{name}") for name, value in given.items()}
    for name in hints:
        if name not in given and name not in defaults:
            raise ConfigError(f"{place}.{name} is missing: write {call.name}({name}=…)")
    with refusing(ConfigError, place):
        return cls(**values)


def looked_up(base: type, call: Call, place: str) -> tuple[Any, dict[str, Any]]:
    """Return the class that is called, and what it is given by the names of its fields."""
    known = choices(base)
    if getattr(base, "small_names", False):
        small = {name.lower(): name for name in known}
        call = Call(small.get(call.name, call.name), call.args, call.given)
    if call.name not in known:
        raise ConfigError(
            f"{place}: unknown class {shown(call.name)}: {suggest(call.name, known)}; "
            "--import MODULE makes those of a module known"
        )
    names = list(types_of(known[call.name]))
    for name in call.given:
        if name not in names:
            raise no_option(f"{place}.", name, names, call.name)
    if len(call.args) > len(names):
        takes = ", ".join(names) or "nothing"
        raise ConfigError(f"{place}: {len(call.args)} values for {call.name}: it takes {takes}")
    given = [*names[: len(call.args)], *call.given], [*call.args, *call.given.values()]
    return known[call.name], at(place, lambda: _once(*given))


def plain(value: Any) -> Any:
    """Return a value of a configuration as YAML holds it: a choice becomes its text.

    The text is the `repr`, which spells out every field: a run's file still means the same once a
    default changes.

    **Raises:** `ConfigError` for a value that does not read back from its text.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    try:
        # as the most general of its kinds, for which the option of a run may ask
        kinds = [kind for kind in type(value).__mro__ if ABC in kind.__mro__[1:]]
        if kinds and fit(kinds[-1], repr(value), "") == value:
            return repr(value)
        why = "it does not read back from its text"
    except ConfigError as error:
        why = str(error).removeprefix(": ")
    raise ConfigError(
        f"a configuration cannot hold {shown(value)} of type {type(value).__name__} ({why}): use "
        "numbers, texts, paths, lists, mappings, and public dataclasses of these"
    )


def homes(value: Any) -> set[str]:
    """Return the modules of the classes in a value that are not altprop's: those to `--import`."""
    own = set()
    if is_dataclass(value):
        own = {type(value).__module__}
        value = {name: getattr(value, name) for name in types_of(type(value))}
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (tuple, list, Mapping)):
        own = own.union(*map(homes, inside))
    return {module for module in own if module.partition(".")[0] != "altprop"}
