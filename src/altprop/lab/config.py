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

from altprop.errors import ConfigError
from altprop.files import write_whole
from altprop.lab.choices import at, no_option, shown, types_of
from altprop.lab.values import fit, plain

Config = TypeVar("Config")


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write values as YAML, one line for each that is no list or mapping, in the order given.

    **Raises:** `ConfigError` for a value that would not read back; see `values.plain`.
    """
    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True, width=math.inf)


def write_config(path: Path, config: Any, without: Iterable[str] = ()) -> None:
    """Write a frozen dataclass as the YAML file that `--config` and `read_config` take.

    **Arguments:** `without`, fields that are left out, which then have the defaults of the reader.
    """
    names = [f.name for f in dataclasses.fields(config) if f.init and f.name not in set(without)]
    write_whole(path, to_yaml({name: getattr(config, name) for name in names}))


def read_config(path: Path, cls: type[Config]) -> Config:
    """Read back a `cls` that `write_config` wrote; it raises as `read_values`."""
    return cls(**read_values(path, cls))


def read_values(path: Path, target: Any) -> dict[str, Any]:
    """Read from a file what a function or dataclass is given, by name.

    **Raises:** `ConfigError` for a file that is not YAML or does not fit; `OSError` for one that
    cannot be read.
    """
    path, hints = path.expanduser(), types_of(target)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file, expected YAML in UTF-8") from None

    def fitted() -> dict[str, Any]:
        data = _mapping(text)
        if hasattr(target, "of_file"):  # what it says depends on where it lies
            data = target.of_file(data, path)
        for name in data:
            if name not in hints:
                raise no_option("", name, hints)
        return {name: fit(hints[name], value, name) for name, value in data.items()}

    return at(str(path), fitted)


def _mapping(text: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _Loader)  # a safe one
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as the date 2000-99-99
        where = " ".join(str(error).replace('in "<unicode string>"', "in it").split())
        raise ConfigError(f"not valid YAML: {where}") from error
    data = {} if data is None else data
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"expected lines such as 'steps: 1000', got {shown(text)}")
    return data


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML by itself takes the last."""

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
