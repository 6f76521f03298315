"""A configuration is a frozen dataclass: `config_dict` turns it into plain data for YAML, and back.

Writing spells out every field, so that a run's file still means the same once a default changes.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from altprop.errors import ConfigError
from altprop.lm.draft import Draft, Spot, shown

Config = TypeVar("Config")


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


def write_config(path: Path, config: Any) -> None:
    """Write a frozen dataclass as the YAML file that `--config` and `read_config` take."""
    path.write_text(to_yaml(config_dict(config)), encoding="utf-8")


def load_mapping(path: Path) -> dict[str, Any]:
    """Load a YAML file of options.

    Raises:
        ConfigError: the file is not YAML, or not a mapping of option names to values.
        OSError: the file cannot be read.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}: {place}not valid YAML ({problem})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file, expected YAML in UTF-8") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: expected lines such as 'steps: 1000', got {shown(data)}")
    return data


def read_config(path: Path, cls: type[Config]) -> Config:
    """Read back a `cls` that `write_config` wrote.

    Raises:
        ConfigError: the file is not YAML, or does not fit `cls`.
        OSError: the file cannot be read.
    """
    spot = Spot(source=str(path))
    value: Config = Draft(cls).updated(load_mapping(path), spot).build(spot)
    return value
