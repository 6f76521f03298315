"""Rules as plain data, for JSON: the name of a class and its fields, looked up and never run."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import CheckpointError, ConfigError, refusing, unknown
from altprop.rule import AbstractRule

_KINDS: tuple[type, ...] = (AbstractRule, AbstractSolver)
_PLAIN = (type(None), bool, int, str)


def written(value: Any) -> Any:
    """Return a rule or solver, or a mapping of names to them, as data that JSON can hold.

    **Raises:** `ConfigError` for a value with a part that is neither one nor plain.
    """
    if isinstance(value, _PLAIN) or isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [written(part) for part in value]
    if isinstance(value, Mapping):
        return {"mapping": {str(name): written(part) for name, part in value.items()}}
    if isinstance(value, _KINDS) and dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        parts = {name: written(getattr(value, name)) for name in fields}
        return {"class": type(value).__name__, "values": parts}
    raise ConfigError(
        f"{value!r} cannot be written as JSON: a rule holds numbers, texts, lists and other rules"
    )


def read(data: Any) -> Any:
    """Return what `written` was given; lists come back as tuples.

    **Raises:** `CheckpointError` for data that it did not write, or a class that nobody knows.
    """
    if isinstance(data, (*_PLAIN, float)):
        return data
    if isinstance(data, list):
        return tuple(read(part) for part in data)
    if isinstance(data, dict) and data.keys() == {"mapping"} and isinstance(data["mapping"], dict):
        return {name: read(part) for name, part in data["mapping"].items()}
    if not (
        isinstance(data, dict)
        and data.keys() == {"class", "values"}
        and isinstance(data["class"], str)
        and isinstance(data["values"], dict)
    ):
        raise CheckpointError(f"{data!r:.80} is no rule, expected its class and its values")
    name, known = data["class"], dict(_classes())
    if name not in known:
        raise CheckpointError(f"{unknown('rule', name, known)}; import the module of your own one")
    values = {field: read(part) for field, part in data["values"].items()}
    with refusing(CheckpointError, f"the values of {name} do not fit it"):
        if known[name].__module__.partition(".")[0] == "altprop":  # others may say anything
            hints = typing.get_type_hints(known[name])
            for field, value in values.items():
                if not _fits(value, hint := hints.get(field, Any)):
                    expected = inspect.formatannotation(hint)
                    raise ValueError(f"{field} is {value!r:.80}, expected {expected}")
        return known[name](**values)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type that a field names."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind is tuple:
        every = parts[:1] * len(value) if parts[1:] == (...,) and type(value) is tuple else parts
        return type(value) is tuple and len(value) == len(every) and all(map(_fits, value, every))
    if hint is float:
        return type(value) is float or type(value) is int and abs(value) < 2**63
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    return hint is Any or isinstance(value, kind or hint)


def _classes() -> Iterator[tuple[str, type]]:
    """Yield all rules and solvers that are imported, altprop's own last."""
    library = importlib.import_module("altprop")
    exports = [getattr(library, name) for name in library.__all__]  # imported on first use
    todo = list(_KINDS)
    for cls in todo:  # it grows
        todo += cls.__subclasses__()
        if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls) and cls.__name__[0] != "_":
            yield cls.__name__, cls
    for cls in exports:
        if isinstance(cls, type) and issubclass(cls, _KINDS) and dataclasses.is_dataclass(cls):
            yield cls.__name__, cls
