"""A configuration is a frozen dataclass, which jsonargparse reads from YAML and the command line.

Writing spells out every field, so that a run's file still means the same once a default changes.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, cast

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings
from jsonargparse.typing import register_type

from altprop.errors import AltpropError, ConfigError, suggest
from altprop.lm.files import write_whole
from altprop.lm.wording import meant, plain_words
from altprop.lm.yaml_text import UNREADABLE, TwiceError, items, load

Config = TypeVar("Config")
_LISTS = (tuple, list, Sequence)


def class_path(cls: type) -> str:
    """Return the shortest dotted path that imports `cls`, such as `altprop.AEP` for an export."""
    package = cls.__module__.partition(".")[0]
    if getattr(sys.modules.get(package), cls.__name__, None) is cls:
        return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def config_dict(config: Any) -> dict[str, Any]:
    """Turn a frozen dataclass into the plain mapping that `--config` reads back.

    A nested dataclass that derives from another class is a choice and becomes
    `{"class_path": ..., "init_args": {...}}` with every field spelled out; one that derives from
    nothing becomes the mapping of its fields. Paths become text, enums their name, tuples lists.

    Raises:
        ConfigError: a value has no plain form.
    """
    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}


def plain(value: Any) -> Any:
    """Turn one value of a configuration into plain data; see `config_dict`."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__bases__ == (object,):
            return config_dict(value)
        return {"class_path": class_path(type(value)), "init_args": config_dict(value)}
    raise ConfigError(
        f"a configuration cannot hold {value!r} of type {type(value).__name__}: use numbers, text, "
        "paths, enums, frozen dataclasses, and tuples or mappings of these"
    )


def to_yaml(data: Mapping[str, Any]) -> str:
    """Write plain data as YAML, in the order given."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)


def write_config(path: Path, config: Any, without: Iterable[str] = ()) -> None:
    """Write a frozen dataclass as the YAML file that `--config` and `read_config` take.

    **Arguments:** `without`, fields that are left out, which then have the defaults of the reader.
    """
    data = {k: v for k, v in config_dict(config).items() if k not in set(without)}
    write_whole(path, to_yaml(data))


def read_config(path: Path, cls: type[Config]) -> Config:
    """Read back a `cls` that `write_config` wrote.

    Raises:
        ConfigError: the file is not YAML, or does not fit `cls`.
        OSError: the file cannot be read.
    """
    parser = Parser()
    parser.add_class_arguments(cls)
    return cls(**parser.built(parser.parse_path(path)))


# Choices: an option whose type is an abstract class takes the name of a class


def choices(base: type) -> dict[str, type]:
    """Return the dataclasses that are a `base`, by the short names that may stand for them.

    These are the exports of the package where `base` is an export itself, and otherwise the public
    classes of the module that defines `base`.
    """
    owner = sys.modules[base.__module__.partition(".")[0]]
    if getattr(owner, base.__name__, None) is not base:
        owner = sys.modules[base.__module__]
    names = [name for name in getattr(owner, "__all__", vars(owner)) if name[0] != "_"]
    return {name: cls for name in names if _is_choice(cls := getattr(owner, name), base)}


def _is_choice(cls: Any, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base) and dataclasses.is_dataclass(cls)


def _named(base: type, name: str) -> type:
    """Return the class that a short name or dotted path means where a `base` is expected."""
    known, problem = choices(base), f"unknown class {name!r}"
    if name in known:
        return known[name]
    if "." in name:
        try:
            cls = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            problem = f"cannot import {name!r} ({error})"
        else:
            if _is_choice(cls, base):
                return cast(type, cls)
            problem = f"{name} is no dataclass that derives from {base.__name__}"
    raise ConfigError(f"{problem}: {suggest(name.rpartition('.')[2], known)}")


def _hints(target: Any) -> dict[str, Any]:
    """Return the types of what a function or dataclass takes, by name."""
    hints = typing.get_type_hints(target)
    return {name: hints[name] for name in inspect.signature(target).parameters}


def _members(hint: Any) -> Sequence[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _bases(hint: Any) -> list[type]:
    return [m for m in _members(hint) if isinstance(m, type) and ABC in m.__mro__]


def _lists(hint: Any) -> list[Any]:
    """Return the members of a type that are lists, if it takes nothing else but null."""
    members = [member for member in _members(hint) if member is not NoneType]
    return members if all(typing.get_origin(member) in _LISTS for member in members) else []


def _listed(hint: Any, value: Any, text: str) -> Any:
    """Return what the word `text` says, `value` as YAML, where a list may stand with commas."""
    lists = _lists(hint)
    if not lists or isinstance(value, (list, tuple, dict)) or text.lstrip().startswith("["):
        return value
    if value is None and text and NoneType in _members(hint):
        return value
    return items(text, as_text=typing.get_args(lists[0])[:1] == (str,))


def _spelled(hint: Any, value: Any) -> Any:
    """Return the plain `value` with all arguments of each class that it names."""
    members, bases = _members(hint), _bases(hint)
    if bases and (isinstance(value, str) or isinstance(value, dict) and "class_path" in value):
        spec = {"class_path": value} if isinstance(value, str) else value
        cls, given = _named(bases[0], str(spec["class_path"])), spec.get("init_args", {})
        if not spec.keys() <= {"class_path", "init_args"} or not isinstance(given, dict):
            raise ConfigError("expected only class_path and a mapping init_args")
        path = class_path(cls)
        given = _spelled_all(_hints(cls), given, f"Problem with given class_path '{path}':\n")
        return {"class_path": path, "init_args": _defaults(cls) | given}
    for member in members:
        origin, items = typing.get_origin(member), typing.get_args(member)
        if origin in (dict, Mapping) and isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ConfigError(f"the name {key} is no text: write '{key}'")
            return _spelled_all(dict.fromkeys(value, items[1]), value)
        if origin in _LISTS and isinstance(value, list):
            return [_spelled(items[0], item) for item in value]
    if isinstance(value, str) and _lists(hint):
        raise ConfigError(f"Expected a <class 'tuple'>. Got value: {value}")
    refused = isinstance(value, (int, float, list)) or value is None and NoneType not in members
    if bases and refused:
        known = ", ".join(choices(bases[0]))
        raise ConfigError(f"Expected a choice of {known}. Got value: {value}")
    return value


def _spelled_all(hints: Mapping[str, Any], data: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    result = {}
    for key, value in data.items():
        if key not in hints:
            raise ConfigError(f"{of}Option '{key}' is not accepted")
        try:
            result[key] = _spelled(hints[key], value)
        except ConfigError as error:
            raise ConfigError(f'{of}Parser key "{key}":\n{error}') from error
    return result


def _defaults(cls: type) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if not dataclasses.is_dataclass(cls):  # the abstract base of a choice
        return result
    for field in dataclasses.fields(cls):
        if field.init and field.default_factory is not dataclasses.MISSING:
            result[field.name] = plain(field.default_factory())
        elif field.init and field.default is not dataclasses.MISSING:
            result[field.name] = plain(field.default)
    return result


# Reading


def _load(text: str) -> Any:
    value = load(text)
    return text if value is None else value  # `#1` is a text; jsonargparse knows `null` itself


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # a shell leaves the ~ of --out=~/run to us


set_loader("altprop", _load, UNREADABLE)
register_type(Path, os.fspath, _path, fail_already_registered=False)  # whose null is no path `None`
set_parsing_settings(
    unset_sentinel=True,  # then null is a value like any other, and no whole number
    docstring_parse_attribute_docstrings=True,
    import_path_denylist=[],  # enforces the list that jsonargparse has
)


class Parser(ArgumentParser):
    """A parser in which naming a class means that class with its own defaults.

    By itself jsonargparse keeps the arguments that two classes share: `--estimator EP` would be an
    `EP` with the `beta` of the class that stood there before. So each named class is spelled out.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **{**kwargs, "parser_mode": "altprop"})
        self.target: Any = None  # the function or class whose arguments are parsed
        self.hints: dict[str, Any] = {}
        self.places: list[str] = []  # the options that may be written without their name
        self.file = ""  # that is being read

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> list[str]:
        self._learn(class_type)
        # jsonargparse cannot write the instances in a tuple or mapping.
        default = {k: v for k, v in _defaults(class_type).items() if "class_path" in str(v)}
        return super().add_class_arguments(class_type, *args, **{"default": default, **kwargs})

    def add_function_arguments(self, function: Any, *args: Any, **kwargs: Any) -> list[str]:
        self._learn(function)
        return super().add_function_arguments(function, *args, **kwargs)

    def _learn(self, target: Any) -> None:
        self.target, self.hints, init = target, _hints(target), target.__init__
        if dataclasses.is_dataclass(target):
            # jsonargparse looks for the annotations of a base in the module of the class itself;
            # if it misses one it lets the fields of the class be anything.
            init.__annotations__.update(self.hints)
        for base in {base for hint in self.hints.values() for base in _bases(hint)}:
            choices(base)  # imports them, for help to list

    # What jsonargparse calls for words, values and files, also in the parser of a class.

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str], *rest: Any, **kwargs: Any
    ) -> Namespace:
        return super().parse_args([self._spelled_word(word) for word in args], *rest, **kwargs)

    def _spelled_word(self, word: str) -> str:
        name, given, text = word.partition("=")
        key = name.removeprefix("--")
        if not given or key not in self.hints:
            return word
        hint = self.hints[key]
        try:
            value = load(text)
        except UNREADABLE as error:
            if isinstance(error, TwiceError) and str not in _members(hint):
                self.error(f'Parser key "{key}":\n{error}', error)
            if not _lists(hint):
                return word  # names no class
            value = text
        try:
            wanted = _listed(hint, value, text)
        except UNREADABLE:
            return word
        wanted = self._spelled_data({key: wanted})[key]
        if wanted == value:
            return word
        return f"{name}={yaml.safe_dump(wanted, default_flow_style=True, width=sys.maxsize)}"

    def parse_object(self, obj: Any, *rest: Any, **kwargs: Any) -> Namespace:
        data = obj if isinstance(obj, dict) else vars(obj)
        if not self.exit_on_error:  # of a class, where words such as --solver.solvers end up
            data = {k: _listed(self.hints.get(k), v, str(v)) for k, v in data.items()}
        return super().parse_object(self._spelled_data(data), *rest, **kwargs)

    def parse_string(self, content: str, *rest: Any, **kwargs: Any) -> Namespace:
        data = self._spelled_data(self._mapping(content))
        return super().parse_string(to_yaml(data), *rest, **kwargs)

    def _mapping(self, content: str) -> dict[str, Any]:
        try:
            data = load(content)
        except TwiceError as error:
            self.error(str(error), error)
        except UNREADABLE as error:
            where = str(error).replace('in "<unicode string>"', "in it")
            self.error(f"not valid YAML: {where}", error)
        data = {} if data is None else data
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            self.error(f"expected lines such as 'steps: 1000', got {content!r:.80}")
        return data

    def parse_path(self, path: str | Path, *rest: Any, **kwargs: Any) -> Namespace:
        self.file, place = f"{path}: ", _path(os.fspath(path))
        try:
            data = self._mapping(place.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            self.error("not a text file, expected YAML in UTF-8", error)
        if hasattr(self.target, "of_file"):  # what it says depends on where it lies
            data = self.target.of_file(data, place)
        namespace = self.parse_string(to_yaml(data), *rest, **kwargs)
        self.file = ""
        return namespace

    def _spelled_data(self, data: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return _spelled_all(self.hints, data)
        except ConfigError as error:
            self.error(str(error), error)

    def built(self, namespace: Namespace) -> dict[str, Any]:
        """Return the arguments that were parsed, by name, with classes built."""
        try:
            values = self.instantiate(namespace)
        except AltpropError:
            raise
        except ValueError as error:  # so jsonargparse wraps what the classes of a union raise
            self.error(str(error), error)
        return {key: value for key, value in vars(values).items() if key in self.hints}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `ConfigError` of one line that says what jsonargparse reports as a tree."""
        if not self.exit_on_error:  # in the parser of a class; the parser around it has more to say
            super().error(message, ex)
        message = meant(message)
        path = re.findall(r'Parser key "(.+?)":', message)
        if found := re.search(_UNKNOWN, message):
            text = self._unknown(path, next(filter(None, found.groups())), message)
        elif found := re.search(r"arguments are required: (.+)", message):
            names = [self._shown([*path, key]) for key in found[1].split(", ")]
            text = f"{', '.join(names)} is missing"
        else:
            text = re.sub(r'Parser key ".+?":|Problem with given class_path .+?:', "", message)
            text = f"{self._shown(path)}: {plain_words(text)}" if path else text
        raise ConfigError(self.file + " ".join(text.split())) from ex

    def _unknown(self, path: list[str], key: str, message: str) -> str:
        names = [re.sub(r"\.(class_path|init_args)", "", k) for k in self.get_defaults().keys()]
        owner, hint = "", "--help lists the options"
        if found := re.findall(r"given class_path '(.+?)'", message):
            names = list(_hints(pkgutil.resolve_name(found[-1])))
            owner = " of " + found[-1].rpartition(".")[2]
            hint = f"it takes {', '.join(names) or 'nothing'}"
        near = [n for n in names if n.rpartition(".")[2] == key or n.startswith(key)]
        near += difflib.get_close_matches(key, names, n=1, cutoff=0.6)
        if self.file and "." in key:
            hint = f"in a file {key.rpartition('.')[2]} stands below {key.rpartition('.')[0]}"
        elif near and near[0] != key:
            hint = f"did you mean {self._shown([*path, near[0]])}?"
        return f"unknown option {self._shown([*path, key])}{owner}: {hint}"

    def _shown(self, path: list[str]) -> str:
        name = ".".join(path)
        return name.upper() if name in self.places else name if self.file else f"--{name}"


_UNKNOWN = r"unrecognized arguments: --([^=\s]+)|Option '(.+?)' is not|NestedArg\(key='(.+?)'"
