"""Every option that takes a list takes it with commas and as YAML, on every command alike."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import yaml

from altprop import Backprop, SignSymmetry
from altprop.errors import ConfigError
from altprop.lab.choices import choices
from altprop.lab.cli import COMMANDS, main
from altprop.lab.config import read_config
from altprop.lab.settings import TrainConfig
from altprop.lab.values import Call, parse
from altprop.lab.words import word


@dataclass(frozen=True)
class ListOption:
    """An option that takes a list: the words that lead to it, its name and what it lists."""

    command: str
    before: tuple[str, ...]
    name: str
    item: Any

    def __str__(self) -> str:
        return f"{self.command} {self.name}"


def members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    return typing.get_args(hint) if union else (hint,)


def arguments(target: Any) -> dict[str, Any]:
    """Return the types of what a function takes, or of the fields of its only dataclass."""
    hints = typing.get_type_hints(target)
    hints = {name: hints[name] for name in inspect.signature(target).parameters}
    only = next(iter(hints.values()))
    whole = dataclasses.is_dataclass(only) and not inspect.isabstract(only)
    return arguments(only) if whole else hints


def list_options(command: str) -> Iterator[ListOption]:
    """Find the options that take lists, also in the classes that options name, each once."""
    module, _, name = COMMANDS[command][0].partition(":")
    function = getattr(importlib.import_module(module), name)
    todo: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [("", (), arguments(function))]
    seen = set()
    for prefix, before, hints in todo:  # it grows
        for name, hint in hints.items():
            option = f"{prefix}{name}"
            for member in members(hint):
                if typing.get_origin(member) in (tuple, list):
                    yield ListOption(command, before, option, typing.get_args(member)[0])
                elif isinstance(member, type) and inspect.isabstract(member):
                    for short, cls in choices(member).items():
                        if cls not in seen and cls.__module__.startswith("altprop"):
                            seen.add(cls)
                            words = (*before, f"--{option}={short}")
                            todo.append((f"{option}.", words, typing.get_type_hints(cls)))


OPTIONS = [option for command in COMMANDS for option in list_options(command)]


_PLAIN = {
    str: ["*.attn.*", "AEP (published, T2=40)"],
    int: ["3", "5"],
    float: ["0.5", "2.5"],
}


def two(item: Any) -> list[str]:
    """Return two different items of a list, as a person writes them."""
    if item in _PLAIN:
        return _PLAIN[item]
    whole = []
    for name, cls in choices(item).items():
        try:
            cls()
        except TypeError:  # it needs an argument
            continue
        whole.append(name)
    return whole[:2]


def read(option: ListOption, words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the list that the command line was given for an option, with classes by name."""
    assert main([option.command, *option.before, *words, "--print_config"]) == 0
    top, *path = option.name.split(".")
    value = yaml.safe_load(capsys.readouterr().out)[top]
    for name in path:
        value = parse(value).given[name]
    return [str(item) if option.item in _PLAIN else short(item) for item in value]


def short(item: Any) -> str:
    """Return the name of a class that is called."""
    call = parse(item) if isinstance(item, str) else item
    assert isinstance(call, Call)
    return call.name


def test_the_search_finds_the_lists_that_the_pages_use() -> None:
    found = {str(option) for option in OPTIONS}
    assert {"audit rows", "audit rules", "train freeze", "explain freeze"} <= found
    assert "train solver.solvers" in found  # and those of classes


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_list_is_read_with_commas_as_yaml_and_from_a_file_alike(
    option: ListOption, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = two(option.item)
    flow = "[" + ", ".join(f'"{name}"' if option.item is str else name for name in names) + "]"
    assert len(names) == 2 and read(option, [f"--{option.name}={flow}"], capsys) == names
    assert read(option, [f"--{option.name}", ",".join(names)], capsys) == names
    assert read(option, [f"--{option.name}", ", ".join(names)], capsys) == names
    assert read(option, [f"--{option.name}", names[0]], capsys) == names[:1]
    if not option.before:
        file = tmp_path / "lists.yaml"
        file.write_text(yaml.safe_dump({option.name: names}), encoding="utf-8")
        assert read(option, ["--config", str(file)], capsys) == names


def test_a_comma_inside_brackets_separates_nothing() -> None:
    texts, shapes = tuple[str, ...], tuple[Any, ...]
    assert word(texts, "AEP (published, T2=40), EP") == ["AEP (published, T2=40)", "EP"]
    assert word(texts, "a.[0,1].b,*,#x,don't") == ["a.[0,1].b", "*", "#x", "don't"]
    assert word(texts, "a),b,") == ["a)", "b"]
    assert word(texts, " ") == [] and word(shapes, " ") == []
    assert word(shapes, "A(1, b=[2, 3]), 'x,y',") == [Call("A", (1,), {"b": [2, 3]}), "x,y"]
    assert word(texts | None, "null") is None


TWICE = [
    ("steps: 3\nlr: 1\nsteps: 4\n", "'steps'", 1, 3),
    ("rules:\n  blocks.*: SignSymmetry\n  head: Backprop\n  blocks.*: Backprop\n",
     r"'blocks.\*'", 2, 4),
    ("rules: {a: SignSymmetry,\n  'a': Backprop}\n", "'a'", 1, 2),
    ("freeze: [{x: 1,\n x: 2}]\n", "'x'", 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "first", "second"), TWICE)
def test_a_key_that_stands_twice_in_a_file_is_refused_with_both_lines(
    text: str, key: str, first: int, second: int, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    said = rf"run.yaml: {key} stands twice, in line {first}, .* and in line {second}, .*: keep one"
    with pytest.raises(ConfigError, match=said) as caught:
        read_config(file, TrainConfig)
    assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_in_a_word_is_refused_unless_the_word_is_a_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--rules", "{'a': Backprop, 'a': SignSymmetry}", "--print_config"]) == 2
    assert capsys.readouterr().err.startswith("altprop: error: --rules: 'a' stands twice: keep")
    assert main(["sample", "run", "--prompt", "{a: 1, a: 2}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["prompt"] == "{a: 1, a: 2}"


def test_what_a_merge_brings_in_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: gpt\nrules: {<<: &a {x: Backprop, y: Backprop}, x: SignSymmetry}\n"
    )
    read = read_config(tmp_path / "run.yaml", TrainConfig)
    assert read.rules == {"x": SignSymmetry(), "y": Backprop()}
