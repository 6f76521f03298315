"""What the words of a command line say: which options, and what for each of them."""

from __future__ import annotations

import re
import typing
from collections import deque
from collections.abc import Sequence
from types import NoneType
from typing import Any

from altprop.errors import ConfigError
from altprop.lab.choices import (
    LISTS,
    at,
    base_of,
    choices,
    defaults_of,
    members_of,
    no_option,
    types_of,
)
from altprop.lab.values import Call, looked_up, parse


def pairs_of(
    prog: str, argv: Sequence[str], switches: Sequence[str], places: Sequence[str]
) -> list[tuple[str, str | None]]:
    """Return the name of each option that is written, in order, and what is written for it."""
    words, free, options = deque(argv), deque(places), True
    pairs: list[tuple[str, str | None]] = []
    while words:
        said = words.popleft()
        name, equals, value = said.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if options and said == "--":
            options = False
        elif not (options and _is_option(said)):
            if not free:
                raise ConfigError(f"unexpected argument {said!r}: {prog} --help lists the options")
            pairs.append((free.popleft(), said))
        elif said == "-h":
            pairs.append(("help", None))
        elif not name.startswith("--"):
            raise ConfigError(f"unknown option {name}: {prog} --help lists the options")
        elif equals:
            pairs.append((key, value))
        elif key in ("help", "print_config"):
            pairs.append((key, ""))
        elif key in switches and not (words and words[0] in ("true", "false")):
            pairs.append((key, "true"))
        else:
            pairs.append((key, words.popleft() if words and not _is_option(words[0]) else None))
    for place in places[: len(places) - len(free)]:
        if sum(name == place for name, _ in pairs) > 1:
            raise ConfigError(
                f"{place.upper()} is given twice, by its place and as --{place}: give it once"
            )
    return pairs


def _is_option(word: str) -> bool:
    """Tell an option from a value such as `-`, `-1` or `-.5`."""
    return word.startswith("-") and (word[1:2] == "-" or word[1:2].isalpha())


def word(hint: Any, text: str) -> Any:
    """Return what a word of the command line says where a `hint` is wanted, still to be fitted."""
    members = members_of(hint)
    if text == "null" and NoneType in members:
        return None
    items = [typing.get_args(m)[0] for m in members if typing.get_origin(m) in LISTS]
    if items == [str] and not text.lstrip().startswith("["):
        commas = r",(?![^(\[]*[)\]])"  # none of those inside brackets
        return [item.strip() for item in re.split(commas, text) if item.strip()]
    if items:
        value = parse(text) if text.strip() else []
        whole = isinstance(value, dict) and any(typing.get_origin(m) is dict for m in members)
        return value if whole or isinstance(value, list) else [value]
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
