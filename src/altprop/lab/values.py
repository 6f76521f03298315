"""A value is written as in Python, such as `AEP(tol=1e-2, solver=GMRES())`, and read but never run.

A text may hold numbers, texts, lists, mappings and calls of known classes. It is parsed into a tree
of these, and only then is a class looked up by its name among those that are already there: the
exports of altprop, and the public classes of modules that are imported already (`--import`). So no
text can import or run anything, wherever it comes from.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import types
import typing
import warnings
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar

import altprop
from altprop.errors import AltpropError, ConfigError, suggest

LONGEST = 10_000  # characters of a text
DEEPEST = 30  # calls and lists in one another
_BITS = 10_000  # of a whole number: Python writes no longer ones
_LISTS = (tuple, list, Sequence)
_EXAMPLE = "such as AEP(tol=0.01, solver=GMRES())"
_WORDS = {"inf": math.inf, "nan": math.nan, "null": None, "true": True, "false": False}
_NO: Any = object()  # what does not fit
T = TypeVar("T")


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


def choices(base: type) -> dict[str, type]:
    """Return the dataclasses that are a `base`, by the names that stand for them.

    Of altprop these are its exports, of other modules that are imported all public classes.
    """
    for name in altprop.__all__:
        getattr(altprop, name)  # an export is imported on first use
    ours: dict[str, type] = {}
    others: dict[str, type] = {}
    todo = [base]
    for cls in todo:  # it grows
        todo += cls.__subclasses__()
        name = cls.__name__
        if name[0] == "_" or not dataclasses.is_dataclass(cls) or inspect.isabstract(cls):
            continue
        if cls.__module__.partition(".")[0] != "altprop":
            others[name] = cls
        elif getattr(altprop, name, None) is cls:
            ours[name] = cls
    return dict(sorted({**others, **ours}.items()))


def fit(hint: Any, value: Any, place: str) -> Any:
    """Return `value` as the type `hint` wants it, with every class that it calls built.

    A text stands for a number as well, because YAML reads `1e-3` as text.

    **Arguments:** `value`, plain data, a text or a tree of `parse`; `place`, its option, which
    errors name.

    **Raises:** `ConfigError` for a value that does not fit, or that a class refuses.
    """
    members, base = _members(hint), base_of(hint)
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
    holds_others = base or any(typing.get_origin(m) in (*_LISTS, dict, Mapping) for m in members)
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
    if origin in _LISTS and isinstance(value, (list, tuple)):
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
        if member is bool and isinstance(value, str):
            return {"true": True, "false": False}.get(value.lower(), _NO)
        if member is int and isinstance(value, str):
            return int(value)
        if member is float and type(value) in (int, str):
            return float(value)
    except (ValueError, OverflowError):
        return _NO
    if member is Path and isinstance(value, str):
        return Path(os.path.expanduser(value))  # a shell leaves the ~ of --out=~/run to us
    if member is int and (type(value) is not int or value.bit_length() > _BITS):
        return _NO
    kind = origin or member
    return value if kind is Any or isinstance(kind, type) and isinstance(value, kind) else _NO


def _built(base: type, call: Call, place: str) -> Any:
    cls, given = looked_up(base, call, place)
    hints, defaults = types_of(cls), defaults_of(cls)
    values = {name: fit(hints[name], value, f"{place}.{name}") for name, value in given.items()}
    for name in hints:
        if name not in given and name not in defaults:
            raise ConfigError(f"{place}.{name} is missing: write {call.name}({name}=…)")
    try:
        return cls(**values)
    except AltpropError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{place}: {error}") from error


def looked_up(base: type, call: Call, place: str) -> tuple[Any, dict[str, Any]]:
    """Return the class that is called, and what it is given by the names of its fields."""
    known = choices(base)
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


# From the command line


def word(hint: Any, text: str) -> Any:
    """Return what a word of the command line says where a `hint` is wanted, still to be fitted."""
    members = _members(hint)
    if text == "null" and NoneType in members:
        return None
    items = [typing.get_args(m)[0] for m in members if typing.get_origin(m) in _LISTS]
    if items == [str] and not text.lstrip().startswith("["):
        commas = r",(?![^(\[]*[)\]])"  # none of those inside brackets
        return [item.strip() for item in re.split(commas, text) if item.strip()]
    if items:
        value = parse(text) if text.strip() else []
        return value if isinstance(value, list) else [value]
    return text


def changed(hint: Any, value: Any, path: Sequence[str], text: str, place: str) -> Any:
    """Return `value` with another word for the one field that a dotted path such as `tol` names."""
    if not path:
        return at(place, lambda: word(hint, text))
    if (base := base_of(hint)) is None:
        raise no_option(f"{place}.", ".".join(path), [])
    call = at(place, lambda: parse(value if isinstance(value, str) else repr(value)))
    if not isinstance(call, Call):
        raise ConfigError(f"{place}: name a class first, one of {', '.join(choices(base))}")
    cls, given = looked_up(base, call, place)
    hints, (name, *rest) = types_of(cls), path
    if name not in hints:
        raise no_option(f"{place}.", name, hints, call.name)
    before = given.get(name, defaults_of(cls).get(name))
    after = changed(hints[name], before, rest, text, f"{place}.{name}")
    return Call(call.name, (), {**given, name: after})


# From a value to a text


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
    if dataclasses.is_dataclass(value):
        own = {type(value).__module__}
        value = {name: getattr(value, name) for name in types_of(type(value))}
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (tuple, list, Mapping)):
        own = own.union(*map(homes, inside))
    return {module for module in own if module.partition(".")[0] != "altprop"}


# What a function or dataclass takes


def types_of(target: Any) -> dict[str, Any]:
    """Return the types of what a function or dataclass takes, by name."""
    hints = typing.get_type_hints(target)
    return {name: hints[name] for name in inspect.signature(target).parameters}


def defaults_of(target: Any) -> dict[str, Any]:
    """Return the defaults of what a function or dataclass takes, without what it must be given."""
    found = {p.name: p.default for p in inspect.signature(target).parameters.values()}
    for f in dataclasses.fields(target) if dataclasses.is_dataclass(target) else ():
        if f.init and f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return {k: value for k, value in found.items() if value is not inspect.Parameter.empty}


def base_of(hint: Any) -> type | None:
    """Return the abstract class of which an option takes a choice."""
    return next((m for m in _members(hint) if isinstance(m, type) and ABC in m.__mro__), None)


def _members(hint: Any) -> Sequence[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


# In words


def described(hint: Any, *, by_kind: bool = False) -> str:
    """Return in words what an option takes; of a choice its kind, or every class there is."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in _LISTS:
        count = "" if origin is not tuple or args[-1] is Ellipsis else f"{len(args)} times "
        return f"a list of {count}{described(args[0], by_kind=by_kind)}"
    if origin in (dict, Mapping):
        return f"a mapping of names to {described(args[1], by_kind=by_kind)}"
    if len(_members(hint)) > 1:
        return " or ".join(described(a, by_kind=by_kind) for a in args)
    if base := base_of(hint):
        kind = _kind(base)
        article = "an" if kind[0] in "aeiou" else "a"
        return f"{article} {kind}" if by_kind else f"one of {', '.join(choices(base))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {NoneType: "null", Path: "a path"}
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def kinds_of(hints: Iterable[Any]) -> dict[str, str]:
    """Return the choices that such options take, every one once, by the kind that it is of."""
    kinds: dict[str, list[str]] = {}
    wide: dict[str, str] = {}
    todo = list(hints)
    for hint in todo:  # it grows
        if (base := base_of(hint)) is None:
            todo += typing.get_args(hint)
            continue
        found: dict[str, list[str]] = {}
        for name, cls in choices(base).items():
            kind = next((c for c in cls.__mro__ if inspect.isabstract(c)), base)
            found.setdefault(_kind(kind), []).append(name)
        kinds |= found
        if _kind(base) not in found:
            wide[_kind(base)] = f"one of {', '.join(found)}"
    return wide | {kind: ", ".join(names) for kind, names in kinds.items()}


def _kind(base: type) -> str:
    return base.__name__.removeprefix("Abstract").lower()


def brief(value: Any) -> str:
    """Write a value as shortly as it reads back: of a class what differs from its own defaults."""
    if dataclasses.is_dataclass(value):
        default = defaults_of(type(value))
        given = {name: getattr(value, name) for name in types_of(type(value))}
        said = [
            f"{name}={repr(v) if isinstance(v, str) else brief(v)}"
            for name, v in given.items()
            if name not in default or v != default[name]
        ]
        return f"{type(value).__name__}({', '.join(said)})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(brief, value))}]"
    return "null" if value is None else str(value).lower() if type(value) is bool else str(value)


def shown(value: Any) -> str:
    """Return a value that was given, on one line that is not too long."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def no_option(start: str, name: str, names: Iterable[str], owner: str = "") -> ConfigError:
    """Return the error for an option or argument that is not there, with the nearest that is."""
    names = list(names)
    near = [n for n in names if n.rpartition(".")[2] == name or n.startswith(name)]
    near += difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    takes = f"it takes {', '.join(names) or 'nothing'}" if owner else "--help lists the options"
    hint = f"did you mean {start}{near[0]}?" if near else takes
    option = f"{start}{name}" if len(name) <= 80 else f"{start}{name[:77]}..."
    return ConfigError(f"unknown option {option}{owner and ' of ' + owner}: {hint}")


def at(place: str, read: Callable[[], T]) -> T:
    """Return what `read` returns, or name the place in its error."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
