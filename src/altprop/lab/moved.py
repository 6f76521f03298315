"""A run and its text may move together: the run's file also says where the text lies from there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from altprop.errors import ConfigError
from altprop.lab.config import to_yaml
from altprop.lab.seal import sealed
from altprop.lm.text import is_path

KEY = "from_here"  # in a run's config.yaml: paths as they are from its folder
_TEXTS = ("data", "validation")


def said_from(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options as its file in `folder` holds them: the texts' places from it too."""
    places = {}
    for name in _TEXTS:
        if options.get(name) is not None and is_path(options[name]):
            with contextlib.suppress(ValueError):  # of another drive
                places[name] = Path(os.path.relpath(options[name], folder)).as_posix()
    return {**options, KEY: places} if places else dict(options)


def written(folder: Path, options: Mapping[str, Any]) -> bytes:
    """Return the content of a run's `config.yaml`, sealed."""
    return sealed(to_yaml(said_from(folder, options)))


def found_from(folder: Path, options: dict[str, Any], places: Any) -> dict[str, Any]:
    """Return the options of a run's file with the places of the texts that have moved with it.

    **Arguments:** `places`, what the file says under `KEY`; where a text is still where it was, or
    is not here either, the option stays as it is. What is found must still be the same text.

    **Raises:** `ConfigError` for places that are none.
    """
    if places is None:
        return options
    if not isinstance(places, dict) or not all(
        name in _TEXTS and isinstance(path, str) and "\0" not in path
        for name, path in places.items()
    ):
        raise ConfigError(f"{KEY}: expected the paths of {' and '.join(_TEXTS)} from the run")
    found = {}
    for name, path in places.items():
        here = os.path.abspath(folder / path)
        if not os.path.exists(str(options.get(name))) and os.path.exists(here):
            found[name] = here
    return {**options, **found}
