"""What a function or dataclass takes, which classes an option may be, and that in words."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import types
import typing
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar

import altprop
from altprop.errors import ConfigError

LISTS = (tuple, list, Sequence)
T = TypeVar("T")


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
    return next((m for m in members_of(hint) if isinstance(m, type) and ABC in m.__mro__), None)


def members_of(hint: Any) -> Sequence[Any]:
    """Return the types of a union, or the only one."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def choices(base: type) -> dict[str, type]:
    """Return the dataclasses that are a `base`, by the names that stand for them.

    Of altprop these are its exports and those of the package that `base` lies in, of other modules
    that are imported all public classes.
    """
    for name in altprop.__all__:
        getattr(altprop, name)  # an export is imported on first use
    home = sys.modules[base.__module__.rpartition(".")[0] or base.__module__]
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
        elif cls in (getattr(altprop, name, None), getattr(home, name, None)):
            ours[name] = cls
    return dict(sorted({**others, **ours}.items()))


def described(hint: Any, *, by_kind: bool = False) -> str:
    """Return in words what an option takes; of a choice its kind, or every class there is."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in LISTS:
        count = "" if origin is not tuple or args[-1] is Ellipsis else f"{len(args)} times "
        return f"a list of {count}{described(args[0], by_kind=by_kind)}"
    if origin in (dict, Mapping):
        return f"a mapping of names to {described(args[1], by_kind=by_kind)}"
    if len(members_of(hint)) > 1:
        return " or ".join(described(a, by_kind=by_kind) for a in args)
    if base := base_of(hint):
        kind = kind_of(base)
        article = "an" if kind[0] in "aeiou" else "a"
        return f"{article} {kind}" if by_kind else f"one of {', '.join(choices(base))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {NoneType: "null", Path: "a path"}
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def kind_of(base: type) -> str:
    """Return an abstract class in a word."""
    return base.__name__.removeprefix("Abstract").lower()


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
