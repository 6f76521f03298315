"""The help of a command is its signature in words: every option of every class now chosen."""

from __future__ import annotations

import argparse
import enum
import inspect
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import docstring_parser

from altprop.lm.draft import EMPTY, Draft, Parameter, is_choice, members, shown, words

_CHOICES = (
    "A class named by an option brings options of its own: name it before --help to see them. "
    "Lists are written 0.9,0.95 and mappings as YAML."
)


def usage(prog: str, function: Callable[..., Any], draft: Draft) -> str:
    """Write the help of the command `prog`, which calls `function` by the `draft`."""
    places = [p for p in draft.parameters.values() if p.positional]
    names = [p.name.upper() if p.default is EMPTY else f"[{p.name.upper()}]" for p in places]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=" ".join([prog, *names, "[--option VALUE ...]"]),
        description=_summary(function),
        epilog=_CHOICES if any(draft.child(name) for name in draft.parameters) else None,
        add_help=False,
    )
    if places:
        group = parser.add_argument_group("arguments")
        for parameter in places:
            name = parameter.name
            group.add_argument(name, metavar=name.upper(), help=_help(parameter, draft))
    group = parser.add_argument_group("general options")
    group.add_argument("-h", "--help", action="store_true", help="Show this and stop.")
    group.add_argument(
        "--config", metavar="FILE", help="Take options from a YAML file; those written here win."
    )
    group.add_argument(
        "--print_config",
        action="store_true",
        help="Print all options as YAML for --config and stop.",
    )
    _add_options(parser, "options", None, draft, "")
    return parser.format_help()


def _add_options(
    parser: argparse.ArgumentParser, title: str, about: str | None, draft: Draft, prefix: str
) -> None:
    """Add one group for the draft, then one for each class that stands in one of its options."""
    options = [p for p in draft.parameters.values() if not p.positional]
    group = parser.add_argument_group(title, about)
    for parameter in options:
        group.add_argument(
            f"--{prefix}{parameter.name}",
            metavar=_metavar(parameter.hint),
            help=_help(parameter, draft),
        )
    for parameter in options:
        child = draft.child(parameter.name)
        if child and child.parameters:
            name = f"{prefix}{parameter.name}"
            about = _summary(child.target)
            _add_options(parser, f"--{name} {child.target.__name__}", about, child, f"{name}.")


def _summary(target: Callable[..., Any]) -> str | None:
    doc = inspect.getdoc(target) or ""
    if doc.startswith(f"{target.__name__}("):  # what dataclass writes where there is no docstring
        return None
    return docstring_parser.parse(doc).short_description


def _help(parameter: Parameter, draft: Draft) -> str:
    notes, value = words(parameter.hint), draft.current(parameter.name)
    if value is EMPTY:
        notes += "; required"
    else:
        notes += f"; {'now' if parameter.name in draft.given else 'default'} {_brief(value)}"
    return f"{parameter.doc} ({notes})".strip().replace("%", "%%")


def _brief(value: Any) -> str:
    """Write a value as one would type it, and a dataclass as the call that makes it."""
    if isinstance(value, Draft):
        return value.target.__name__
    if is_dataclass(value) and not isinstance(value, type):
        fields = Draft(type(value)).parameters.values()
        changed = [p.name for p in fields if getattr(value, p.name) != p.default]
        inside = ", ".join(f"{name}={_brief(getattr(value, name))}" for name in changed)
        return f"{type(value).__name__}({inside})" if inside else type(value).__name__
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_brief, value))}]"
    if isinstance(value, str) and value.isprintable() and value.strip():
        return value
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, Path) else shown(value)


def _metavar(hint: Any) -> str:
    kinds = [member for member in members(hint) if member is not NoneType]
    if len(kinds) > 1:
        return "VALUE"
    kind = kinds[0]
    if is_choice(kind) or is_dataclass(kind):
        return "CLASS"
    if typing.get_origin(kind) in (tuple, list):
        return "LIST"
    names = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: "true|false"}
    return names.get(kind, "VALUE")
