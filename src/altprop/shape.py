"""What plain data that somebody else may have written must be, and in words where it is not.

A shape is a type (`str`, `bool`, `int`, `float` for any number), `None`, a tuple of shapes of which
one will do, a list of one shape (any number of such values) or of several (as many values), or a
mapping: of names to shapes (`"name?"` may be missing, other names may be there), or of the type
`str` to one (any names).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

LARGEST = 1e100  # of numbers: what is computed of them stays finite
_WORDS: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def check_shape(data: object, shape: Any, where: str = "") -> None:
    """Refuse data of another shape, with the first place at which it is one.

    **Raises:** `ValueError`.

    >>> check_shape({"loss": [1.0, "x"]}, {"loss": [float]})
    Traceback (most recent call last):
    ValueError: loss[1] is 'x', expected a number
    """
    for problem in _misfits(data, shape, where):
        raise ValueError(problem)


def _misfits(data: object, shape: Any, where: str) -> Iterator[str]:
    """Yield what is wrong with data."""
    if isinstance(shape, tuple):
        inside = next(
            (s for s in shape if type(s) is type(data) and isinstance(s, (list, dict))), None
        )
        if inside is not None:
            yield from _misfits(data, inside, where)
        elif not any(next(_misfits(data, s, where), None) is None for s in shape):
            yield _told(data, shape, where)
    elif isinstance(shape, (list, dict)) and type(data) is not type(shape):
        yield _told(data, shape, where)
    elif isinstance(shape, list):
        assert isinstance(data, list)
        if len(shape) > 1 and len(data) != len(shape):
            yield f"{where or 'it'} has {len(data)} values, expected {len(shape)}"
        for index, (value, each) in enumerate(
            zip(data, shape if len(shape) > 1 else repeat(shape[0]), strict=False)
        ):
            yield from _misfits(value, each, f"{where}[{index}]")
    elif isinstance(shape, dict):
        assert isinstance(data, dict)
        yield from _of_names(data, shape, where)
    elif not _is(data, shape):
        yield _told(data, shape, where)


def _of_names(data: dict[Any, Any], shape: dict[Any, Any], where: str) -> Iterator[str]:
    below = f"{where}." if where else ""
    if str in shape:
        for name, value in data.items():
            yield from _misfits(name, str, f"a name in {where or 'it'}")
            shown = name if name.isidentifier() else f"{name!r:.40}"
            yield from _misfits(value, shape[str], f"{below}{shown}")
        return
    if missing := [name for name in shape if name[-1] != "?" and name not in data]:
        yield f"{f'{where} has' if where else 'there is'} no {', '.join(missing)}"
        return
    for name, each in shape.items():
        if (plain := name.removesuffix("?")) in data:
            yield from _misfits(data[plain], each, f"{below}{plain}")


def _is(data: object, shape: Any) -> bool:
    if shape is None:
        return data is None
    if shape is float:
        return type(data) in (int, float) and abs(data) <= LARGEST  # type: ignore[arg-type]
    if type(data) is not shape:
        return False
    return shape is not int or abs(data) < 2**63  # type: ignore[arg-type]


def _told(data: object, shape: Any, where: str) -> str:
    kinds: dict[Any, str] = {dict: "a mapping", list: "a list"}
    got = kinds[type(data)] if type(data) in kinds else f"{data!r:.40}"
    ways = shape if isinstance(shape, tuple) else (shape,)
    words = [
        "null" if way is None else _WORDS.get(way) if isinstance(way, type) else kinds[type(way)]
        for way in ways
    ]
    return f"{where or 'it'} is {got}, expected {' or '.join(map(str, words))}"
