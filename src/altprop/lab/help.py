"""What `--help` prints: what is taken, its defaults, and every choice once, by its kind."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from altprop.errors import ConfigError
from altprop.lab.choices import base_of, choices, defaults_of, described, kind_of, types_of
from altprop.lab.values import Call, looked_up


def print_help(said: Any, target: Any, more: Mapping[str, str], before: str = "") -> None:
    """Print what the docstring of `said` is about, what `target` takes, and the choices once."""
    print((inspect.getdoc(said) or "").partition("\n\n")[0] + "\n\noptions:")
    lines, words, defaults, types = {}, _words_on(target), defaults_of(target), types_of(target)
    for name, hint in types.items():
        default = f"default: {brief(defaults[name])}" if name in defaults else "required"
        takes = described(hint, by_kind=True)
        lines[f"--{before}{name}"] = f"{words.get(name, '')} ({takes}; {default})".strip()
    lines |= {f"--{name}": text for name, text in more.items()}
    if kinds := kinds_of(types.values()):
        lines |= {"": "", "choices:": "written as in Python, such as AEP(tol=0.01)"} | kinds
    for name, text in lines.items():
        start = f"  {name:19} " if name[-1:] != ":" else f"{name:21} "
        print(textwrap.fill(text, 100, initial_indent=start, subsequent_indent=" " * 22).rstrip())


def help_on_class(option: str, hint: Any, name: str, default: object) -> None:
    """Print what the class `name` takes that an option of this type may be, or the default's."""
    if (base := base_of(hint)) is None:
        raise ConfigError(f"unknown option --{option}.help: --{option} takes no class")
    if not name and default is None:
        raise ConfigError(
            f"--{option}.help: name a class after it, one of {', '.join(choices(base))}"
        )
    cls, _ = looked_up(base, Call(name or type(default).__name__), f"--{option}")
    print_help(cls, cls, {}, f"{option}.")


def _words_on(target: Any) -> dict[str, str]:
    """Return what the section `Args:` of a docstring says of each argument."""
    found: dict[str, str] = {}
    for line in (inspect.getdoc(target) or "").partition("Args:\n")[2].splitlines():
        if line[:1].strip():
            break  # the next section
        if start := re.match(r" {4}(\w+): (.*)", line):
            found[name := start[1]] = start[2]
        elif found and line.strip():
            found[name] += f" {line.strip()}"
    return found


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
            found.setdefault(kind_of(kind), []).append(name)
        kinds |= found
        if kind_of(base) not in found:
            wide[kind_of(base)] = f"one of {', '.join(found)}"
    return wide | {kind: ", ".join(names) for kind, names in kinds.items()}


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
