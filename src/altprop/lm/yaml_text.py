"""YAML as a person means it: a key stands once, and a list may be written with commas."""

from __future__ import annotations

from typing import Any

import yaml

# such as the date 2000-99-99, and a thousand brackets
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


class TwiceError(yaml.YAMLError):
    """A key stands twice in one mapping, where YAML by itself takes the last without a word."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # here and not where it is built: by then what a merge (`<<`) brings in stands there too
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if before := seen.get((key.tag, key.value)):
                raise TwiceError(
                    f"{key.value!r} stands twice, in {_place(before)} and in "
                    f"{_place(key.start_mark)}: keep one of them"
                )
            seen[key.tag, key.value] = key.start_mark
        return node


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def load(text: str) -> Any:
    """Read YAML.

    **Raises:** one of `UNREADABLE`; among them `TwiceError` for a key that stands twice.
    """
    return yaml.load(text, _Loader)  # a safe one


def items(text: str, *, as_text: bool) -> list[Any]:
    """Read a list that is written with commas, such as `AEP,Implicit`.

    A comma inside brackets or quotes separates nothing. What is wanted as text is taken as it is,
    but for quotes around it; everything else is YAML.

    **Raises:** as `load`.
    """
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            pieces.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not pieces[-1].strip():
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth = max(0, depth - 1)
        pieces[-1] += letter
    words = [piece.strip() for piece in pieces]
    if not words[-1]:
        words.pop()  # of no text at all, or after a last comma
    return [word if as_text and word[:1] not in ("'", '"') else load(word) for word in words]
