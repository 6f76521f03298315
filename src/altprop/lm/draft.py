"""A draft is a call in the making: words and YAML fill in the arguments of a function or class.

Whatever nobody gave is left to Python. So a default is exactly the default of the signature, and
naming a class, as in `--estimator EP`, means `EP()`: it takes over nothing from the class that
stood there before.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import inspect
import operator
import pkgutil
import sys
import types
import typing
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import docstring_parser
import yaml

from altprop.errors import ConfigError, suggest

EMPTY: Any = inspect.Parameter.empty
_SEQUENCES = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)


class Text(str):
    """A word of a command line: unlike a YAML value, its type is still open."""


@dataclass(frozen=True)
class Spot:
    """Where a value was given: the dotted name of an option, in a file or on the command line."""

    path: str = ""
    source: str | None = None

    def at(self, key: str) -> Spot:
        return Spot(f"{self.path}.{key}" if self.path else key, self.source)

    def __str__(self) -> str:
        return f"--{self.path}" if self.source is None else f"{self.source}: {self.path}"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function or field of a dataclass; `positional` if taken by place."""

    name: str
    hint: Any
    default: Any
    positional: bool
    doc: str


@functools.cache
def parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """Return what a function or dataclass can be given, by name, with types and documentation.

    The documentation is that of the docstring's `Args:` section, or of the strings below fields.
    """
    hints = typing.get_type_hints(target)
    docs = {}
    for owner in reversed(getattr(target, "__mro__", (target,))):
        if owner is target or is_dataclass(owner):  # not ABC, object
            for entry in docstring_parser.parse_from_object(owner).params:
                docs[entry.arg_name] = " ".join((entry.description or "").split())
    if is_dataclass(target):
        found = [(f.name, _field_default(f), False) for f in dataclasses.fields(target) if f.init]
    else:
        signature = inspect.signature(target).parameters.values()
        found = [(p.name, p.default, p.kind is not p.KEYWORD_ONLY) for p in signature]
    return {
        name: Parameter(name, hints[name], default, positional, docs.get(name, ""))
        for name, default, positional in found
    }


def _field_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return EMPTY if field.default is dataclasses.MISSING else field.default


@dataclass(frozen=True)
class Draft:
    """A call in the making: what is called, and the arguments given so far.

    Args:
        target: a function or a dataclass.
        start: an instance of `target` whose fields stay unless given, or None to start afresh.
        given: typed values by parameter name; a dataclass under change is again a `Draft`.
    """

    target: Callable[..., Any]
    start: Any = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What `target` takes, by name."""
        return parameters(self.target)

    def current(self, key: str) -> Any:
        """Return what `key` is now: given, of the start, or the default (`EMPTY` if none)."""
        if key in self.given:
            return self.given[key]
        return self.parameters[key].default if self.start is None else getattr(self.start, key)

    def child(self, key: str) -> Draft | None:
        """Return the draft of the dataclass that `key` is now, or None where it is none."""
        return _as_draft(self.current(key))

    def updated(self, raw: Mapping[str, Any], spot: Spot = Spot()) -> Draft:
        """Return this draft with the entries of `raw`, which are YAML values or `Text`, in it.

        Raises:
            ConfigError: a key is unknown or a value does not fit; it names the nearest that does.
        """
        given = dict(self.given)
        for key, value in raw.items():
            if key not in self.parameters:
                raise unknown_option(self, spot, str(key))
            given[key] = _assign(self.parameters[key].hint, self.current(key), value, spot.at(key))
        return replace(self, given=given)

    def arguments(self, spot: Spot = Spot()) -> dict[str, Any]:
        """Return every argument: what was given, built, and else what stands there now.

        Raises:
            ConfigError: an argument without a default was not given.
        """
        for parameter in self.parameters.values():
            if self.current(parameter.name) is EMPTY:
                name = parameter.name.upper() if parameter.positional else spot.at(parameter.name)
                raise ConfigError(f"{name} is missing: give {words(parameter.hint)}")
        return {key: _built(self.current(key), spot.at(key)) for key in self.parameters}

    def build(self, spot: Spot = Spot()) -> Any:
        """Make the call, or change the fields of the start, by what was given and nothing else."""
        arguments = self.arguments(spot)
        given = {key: arguments[key] for key in self.given}
        return self.target(**given) if self.start is None else replace(self.start, **given)


def command_draft(function: Callable[..., Any]) -> tuple[Draft, bool]:
    """Return the draft of a command, and whether it is that of a dataclass.

    A function that takes one dataclass and nothing else takes its fields as options.
    """
    first, *others = parameters(function).values() or [None]
    if first and not others and is_dataclass(first.hint):
        start = None if first.default is EMPTY else first.default
        return Draft(typing.cast(type, first.hint), start), True
    return Draft(function), False


def find(draft: Draft, path: Sequence[str]) -> Parameter:
    """Return the parameter that the dotted name `path` means in the draft as it stands.

    Raises:
        ConfigError: there is none; it names the nearest that there is.
    """
    spot = Spot()
    for key in path[:-1]:
        child = draft.child(key) if key in draft.parameters else None
        if child is None and key in draft.parameters:
            raise ConfigError(
                f"unknown option --{'.'.join(path)}: {spot.at(key)} is "
                f"{shown(draft.current(key))}, it takes {words(draft.parameters[key].hint)}"
            )
        if child is None:
            raise unknown_option(draft, spot, key)
        draft, spot = child, spot.at(key)
    if path[-1] not in draft.parameters:
        raise unknown_option(draft, spot, path[-1])
    return draft.parameters[path[-1]]


def _as_draft(value: Any) -> Draft | None:
    if isinstance(value, Draft):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return Draft(type(value), start=value)
    return None


def _built(value: Any, spot: Spot) -> Any:
    if isinstance(value, Draft):
        return value.build(spot)
    if isinstance(value, (tuple, list)):
        return type(value)(_built(item, spot.at(str(i))) for i, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _built(item, spot.at(str(key))) for key, item in value.items()}
    return value


# One value and its type


def members(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the one type that `hint` is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def is_choice(hint: Any) -> bool:
    """Tell whether a type is abstract, so that a value is chosen by naming a class."""
    return isinstance(hint, type) and ABC in hint.__mro__ and not is_dataclass(hint)


def choices(base: type) -> dict[str, type]:
    """Return the dataclasses that are a `base`, by the short names that may stand for them.

    These are the exports of the package where `base` is an export itself, and otherwise the public
    classes of the module that defines `base`.
    """
    owner = sys.modules[base.__module__.partition(".")[0]]
    if getattr(owner, base.__name__, None) is not base:
        owner = sys.modules[base.__module__]
    found = {}
    for name in getattr(owner, "__all__", None) or list(vars(owner)):
        value = getattr(owner, name)
        if not name.startswith("_") and _is_concrete(value, base):
            found[name] = value
    return found


def _is_concrete(value: Any, base: type) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, base)
        and is_dataclass(value)
        and not inspect.isabstract(value)
    )


def _class(base: type, name: str, spot: Spot) -> type:
    """Return the class that a short name or dotted path means where a `base` is expected."""
    known = choices(base)
    if name in known:
        return known[name]
    if "." not in name:
        raise ConfigError(f"{spot}: unknown class {name!r}: {suggest(name, known)}")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = suggest(name.rpartition(".")[2], known)
        raise ConfigError(f"{spot}: cannot import {name!r} ({error}): {hint}") from error
    if not _is_concrete(found, base):
        raise ConfigError(
            f"{spot}: {name} is no dataclass that derives from {base.__name__}: "
            f"{suggest(name.rpartition('.')[2], known)}"
        )
    return typing.cast(type, found)


def _is_structured(hint: Any) -> bool:
    return (
        is_choice(hint) or is_dataclass(hint) or typing.get_origin(hint) in _SEQUENCES + _MAPPINGS
    )


def _assign(hint: Any, current: Any, raw: Any, spot: Spot) -> Any:
    """Turn `raw` into a value of the type `hint`, or into a `Draft` of one."""
    alternatives = [member for member in members(hint) if member is not types.NoneType]
    if len(alternatives) < len(members(hint)) and (raw is None or _is_null(raw)):
        return None
    if raw is None:
        raise _misfit(hint, raw, spot)
    if not any(_is_structured(member) for member in alternatives):
        return _leaf(functools.reduce(operator.or_, alternatives), raw, spot)
    if isinstance(raw, Text) and raw[:1] in ("{", "["):
        raw = _parsed(raw, brackets=False, hint=hint, spot=spot)
    # Of several alternatives the one whose form fits comes first; its error is the one that helps.
    failures = []
    for member in sorted(alternatives, key=lambda m: not _has_form(m, raw)):
        try:
            return _assign_one(member, current, raw, spot)
        except ConfigError as error:
            failures.append(error)
    raise failures[0]


def _is_null(raw: Any) -> bool:
    return isinstance(raw, Text) and raw == "null"


def _has_form(member: Any, raw: Any) -> bool:
    if isinstance(raw, Mapping) and not {"class_path", "init_args"} & set(raw):
        return typing.get_origin(member) in _MAPPINGS
    if isinstance(raw, (list, tuple)):
        return typing.get_origin(member) in _SEQUENCES
    return is_choice(member) or is_dataclass(member)


def _assign_one(member: Any, current: Any, raw: Any, spot: Spot) -> Any:
    origin, items = typing.get_origin(member), typing.get_args(member)
    if not _is_structured(member):
        return _leaf(member, raw, spot)
    if isinstance(raw, Text) and origin is not None:
        raw = _parsed(raw, brackets=origin in _SEQUENCES, hint=member, spot=spot)
    if origin is None:
        return _assign_class(member, current, raw, spot)
    if origin in _MAPPINGS:
        if not isinstance(raw, Mapping):
            raise _misfit(member, raw, spot)
        return {k: _assign(items[1], EMPTY, v, spot.at(str(k))) for k, v in raw.items()}
    if not isinstance(raw, (list, tuple)):
        raise _misfit(member, raw, spot)
    if origin is not tuple or items[-1] is Ellipsis:
        items = items[:1] * len(raw)
    if len(items) != len(raw):
        raise _misfit(member, raw, spot)
    pairs = enumerate(zip(items, raw, strict=True))
    values = [_assign(item, EMPTY, value, spot.at(str(i))) for i, (item, value) in pairs]
    return values if origin is list else tuple(values)


def _parsed(raw: Text, *, brackets: bool, hint: Any, spot: Spot) -> Any:
    """Read a word of the command line as YAML; a list may come without its brackets."""
    try:
        return yaml.safe_load(f"[{raw}]" if brackets else raw)
    except yaml.YAMLError as error:
        raise _misfit(hint, raw, spot) from error


def _assign_class(base: Any, current: Any, raw: Any, spot: Spot) -> Draft:
    if isinstance(raw, str):
        return Draft(_class(base, raw, spot))
    if not isinstance(raw, Mapping):
        raise _misfit(base, raw, spot)
    if not {"class_path", "init_args"} & set(raw):
        fields = raw
    elif set(raw) <= {"class_path", "init_args"} and isinstance(raw.get("init_args", {}), Mapping):
        fields = raw.get("init_args", {})
    else:
        raise ConfigError(f"{spot}: expected only class_path and init_args, got {shown(raw)}")
    if "class_path" in raw:
        return Draft(_class(base, str(raw["class_path"]), spot)).updated(fields, spot)
    draft = _as_draft(current) or (None if is_choice(base) else Draft(base))
    if draft is None:
        raise ConfigError(f"{spot} has no class yet: give {words(base)} first")
    return draft.updated(fields, spot)


def _leaf(hint: Any, raw: Any, spot: Spot) -> Any:
    if isinstance(raw, Text):
        if hint is str:
            return str(raw)
        raw = str(raw)
    elif type(raw) in members(hint):
        return raw
    from jsonargparse import ArgumentError, ArgumentParser  # late: only a given value needs it

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": raw})["value"]
    except ArgumentError as error:
        raise _misfit(hint, raw, spot) from error


# Words for errors and help


def _misfit(hint: Any, raw: Any, spot: Spot) -> ConfigError:
    return ConfigError(f"{spot}: expected {words(hint)}, got {shown(raw)}")


def shown(raw: Any) -> str:
    """Write a YAML value or a word of a command line in one line, not too long."""
    if raw is None or isinstance(raw, bool):
        return "null" if raw is None else str(raw).lower()
    text = repr(raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


def words(hint: Any) -> str:
    """Say in plain words what values a type has."""
    simple = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        types.NoneType: "null",
    }
    if hint in simple:
        return simple[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(members(hint)) > 1:
        return " or ".join(words(member) for member in members(hint))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in _MAPPINGS:
        return f"a mapping to {words(args[1])}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} ({', '.join(map(words, args))})"
    if origin in _SEQUENCES:
        return f"a list, each {words(args[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(hint.__members__)}"
    if is_dataclass(hint):
        return f"the fields of {getattr(hint, '__name__', hint)}"
    if is_choice(hint):
        return f"one of {', '.join(sorted(choices(hint)))}"
    return f"a value of type {getattr(hint, '__name__', hint)}"


def option_names(draft: Draft, prefix: str = "") -> list[str]:
    """Return the dotted names of all options that the draft takes as it stands."""
    names = []
    for name in parameters(draft.target):
        names.append(prefix + name)
        if child := draft.child(name):
            names += option_names(child, f"{prefix}{name}.")
    return names


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known dotted name that `name` most likely stands for."""
    alike = [k for k in known if k.rpartition(".")[2] == name]
    alike += [k for k in known if name and k.startswith(name)]  # abbreviated
    alike += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return alike[0] if alike else None


def unknown_option(draft: Draft, spot: Spot, key: str) -> ConfigError:
    """Return the error for a `key` that the draft at `spot` does not take."""
    owner = f" of {draft.target.__name__}" if spot.path else ""
    if near := nearest(key, option_names(draft)):
        hint = f"did you mean {spot.at(near) if spot.source is None else spot.at(near).path}?"
    elif spot.path:
        hint = f"it takes {', '.join(draft.parameters) or 'none'}"
    else:
        hint = "--help lists the options"
    kind = "option" if spot.source is None else "key"
    return ConfigError(f"unknown {kind} {spot.at(key)}{owner}: {hint}")
