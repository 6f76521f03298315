"""A configuration is a frozen dataclass that YAML and the command line can write.

A file holds one line for each option, and a choice as the text of its constructor; see `values`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from altprop.errors import ConfigError, refusing
from altprop.files import write_whole
from altprop.lab.choices import at, no_option, shown, types_of
from altprop.lab.values import LONGEST, fit, plain
from altprop.reading import DEEPEST, place, read_bytes
from altprop.terminal import printable

Config = TypeVar("Config")
LARGEST = 256 << 10  # bytes of a file
MOST = 10_000  # values in it, those behind an alias wherever it stands
# what says where is written: only the command line does, for a file may be somebody else's
WRITES = ("out", "resume", "overwrite", "json", "html", "png", "csv")


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write values as YAML, one line for each that is no list or mapping, in the order given.

    **Raises:** `ConfigError` for a value that would not read back; see `values.plain`.
    """
    text = yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True, width=math.inf)
    if printable(text, keep="\n") != text:  # then all that is not ASCII is escaped
        text = yaml.safe_dump(plain(values), sort_keys=False, width=math.inf)
    return text


def write_config(path: Path, config: Any, without: Iterable[str] = ()) -> None:
    """Write a frozen dataclass as the YAML file that `--config` and `read_config` take.

    **Arguments:** `without`, fields that are left out, which then have the defaults of the reader.
    """
    names = [f.name for f in dataclasses.fields(config) if f.init and f.name not in set(without)]
    write_whole(path, to_yaml({name: getattr(config, name) for name in names}))


def read_config(path: Path, cls: type[Config]) -> Config:
    """Read back a `cls` that `write_config` wrote; it raises as `read_values`."""
    return cls(**read_values(path, cls))


def read_values(path: Path, target: Any, unsaid: Iterable[str] = ()) -> dict[str, Any]:
    """Read from a file what a function or dataclass is given, by name.

    **Arguments:** `unsaid`, options that a file must not give.

    **Raises:** `ConfigError` for a file that is not YAML or does not fit, or gives what is
    `unsaid`; `OSError` for one that cannot be read.
    """
    path = place(path)
    return at(str(path), lambda: values_of(read_mapping(path), path, target, unsaid))


def values_of(
    data: dict[str, Any], path: Path, target: Any, unsaid: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what a function or dataclass is given by the plain data that a file holds.

    **Raises:** as `read_values`.
    """
    hints = types_of(target)
    refuse(name for name in unsaid if name in hints and data.get(name) not in (None, False))
    if hasattr(target, "of_file"):  # what it says depends on where it lies
        data = target.of_file(data, path)
    for name in data:
        if name not in hints:
            raise no_option("", name, hints)
    return {name: fit(hints[name], value, name) for name, value in data.items()}


def refuse(said: Iterable[str]) -> None:
    """Refuse the first of the options that a file gives and must not give, if there is any."""
    for name in said:
        raise ConfigError(f"{name} is not read from a file: write --{name} instead")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of options as plain data.

    **Raises:** `ConfigError` for what is none, `OSError` for a file that cannot be read.
    """
    try:
        text = read_bytes(path, LARGEST).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("not a text file, expected YAML in UTF-8") from None
    try:
        with refusing(ConfigError, "not valid YAML"):  # such as the date 2000-99-99
            data = yaml.load(text, _Loader)  # a safe one
    except ConfigError as error:
        raise ConfigError(str(error).replace('in "<unicode string>"', "in it")) from error.__cause__
    data = {} if data is None else data
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"expected lines such as 'steps: 1000', got {shown(text)}")
    return data


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML by itself takes the last.

    It also bounds how much a text says, and how deeply: an alias counts as what it stands for.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # of nodes: how many values, how deep

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        self._bound(0, self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None, "yaml returns None between documents alone"
        if not alias:
            self._sizes[id(node)] = self._size(node)
        elif id(node) not in self._sizes:  # it is not read to its end yet
            raise ConfigError("an alias stands inside of what it stands for")
        count, depth = self._sizes[id(node)]
        self._bound(count, self._depth + depth)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > LONGEST:
                raise ConfigError(
                    f"a text of {len(node.value)} characters, expected at most {LONGEST}"
                )
            return 1, 0
        pairs = isinstance(node, yaml.MappingNode)
        inside = [item for pair in node.value for item in pair] if pairs else node.value
        sizes = [self._sizes[id(item)] for item in inside]
        return 1 + sum(n for n, _ in sizes), 1 + max((d for _, d in sizes), default=0)

    def _bound(self, count: int, depth: int) -> None:
        if count > MOST or depth > DEEPEST:
            raise ConfigError(
                f"more than {MOST} values, or more than {DEEPEST} levels in one another"
            )

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # here and not where it is built: by then what a merge (`<<`) brings in stands there too
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if before := seen.get((key.tag, key.value)):
                marks = [
                    f"line {m.line + 1}, column {m.column + 1}" for m in (before, key.start_mark)
                ]
                raise ConfigError(
                    f"{key.value!r} stands twice, in {' and in '.join(marks)}: keep one of them"
                )
            seen[key.tag, key.value] = key.start_mark
        return node
