"""The command line: a command is a function, and its options are what the function takes.

The table below is all that this file knows of the commands. Listing them imports nothing else; only
a command that runs is imported, so that `altprop --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import os
import re
import sys
import textwrap
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altprop
from altprop.errors import AltpropError, ConfigError, unknown

Commands = Mapping[str, tuple[str, str]]

COMMANDS: Commands = {
    "train": ("altprop.lab.train:train", "Train a language model by a rule of your choice."),
    "audit": ("altprop.lab.audit_command:audit", "Compare gradients with an exact one."),
    "sample": ("altprop.lab.sample_command:sample", "Write text with a trained model."),
    "explain": ("altprop.lab.explain_command:explain_run", "Show what each parameter receives."),
    "data": ("altprop.lab.data_command:data", "List, describe or encode corpora."),
}


def main(argv: Sequence[str] | None = None, commands: Commands = COMMANDS) -> int:
    """Run `altprop` and return its exit status.

    The status is 0, 2 for bad input (one line on standard error says what to write instead), 130
    after an interrupt, and 141 when the reader of the output went away. Anything else that goes
    wrong is a bug and keeps its traceback.
    """
    try:
        _run(sys.argv[1:] if argv is None else argv, commands)
        sys.stdout.flush()
    except AltpropError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("altprop: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _end_output()
        return 141
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end_output()
        return _fail(f"{error.strerror}: free some; a run goes on with --resume")
    return 0


def _end_output() -> None:
    """Write what standard output still holds, or drop it: Python flushes it again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print("altprop: error:", " ".join(message.split("\n")), file=sys.stderr)
    return 2


def _run(argv: Sequence[str], commands: Commands) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(commands))
    elif argv[0] == "--version":
        print(f"altprop {altprop.__version__}")
    elif argv[0] in commands:
        module, _, attribute = commands[argv[0]][0].partition(":")
        function = getattr(importlib.import_module(module), attribute)
        _call(f"altprop {argv[0]}", function, argv[1:])
    elif argv[0].startswith("-"):
        raise ConfigError(
            f"unknown option {argv[0]}: write a command first, one of {', '.join(commands)}"
        )
    else:
        raise unknown("command", argv[0], commands)


def _overview(commands: Commands) -> str:
    width = max(map(len, commands))
    return "\n".join(
        [
            "usage: altprop COMMAND [--option VALUE ...]",
            "",
            "Train language models by learning rules other than backprop.",
            "",
            "commands:",
            *(f"  {name:{width}}  {line}" for name, (_, line) in commands.items()),
            "",
            "'altprop COMMAND --help' lists the options of a command; 'altprop --version' is the",
            "version.",
        ]
    )


def _call(prog: str, function: Callable[..., Any], argv: Sequence[str]) -> None:
    """Call `function` with what the words `argv` say, or print what they ask for instead.

    The keyword-only parameters of the function are options; the others may also be written without
    their name. If its only parameter is a dataclass, the fields of that are the options.
    """
    from altprop.lab.config import read_values, to_yaml
    from altprop.lab.values import changed, defaults_of, fit, no_option, types_of

    parameters = list(inspect.signature(function).parameters.values())
    target: Any = function
    if len(parameters) == 1:
        hint = typing.get_type_hints(function)[parameters[0].name]
        target = hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else function
    places = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and target is function]
    types, values = types_of(target), defaults_of(target)
    option = {name: name.upper() if name in places else f"--{name}" for name in types}
    pairs = _pairs(prog, argv, [name for name, hint in types.items() if hint is bool], places)
    for name, text in pairs:
        if name not in _EVERYWHERE and name.partition(".")[0] not in types:
            parts = (f"{n}.{p}" for n, v in values.items() for p in getattr(v, "__dict__", ()))
            raise no_option("--", name, [*types, *_EVERYWHERE, *parts])
        if text is None and not name.endswith("help"):
            raise ConfigError(f"--{name}: expected a value, such as --{name} VALUE")
    asked = {name: text or "" for name, text in pairs}
    for name, text in pairs:
        if name == "import":
            _import(str(text))
    if helped := [name for name in asked if name.rpartition(".")[2] == "help"]:
        name, _, _ = helped[0].rpartition(".")
        if name:
            _help_on_class(name, types.get(name), asked[helped[0]], values.get(name))
        else:
            shown = [f"[{p.upper()}]" if p in values else p.upper() for p in places]
            print("usage:", *[prog, *shown, "[--option VALUE ...]"], end="\n\n")
            _help(function, target, _EVERYWHERE)
        return
    for name, text in pairs:
        if name == "config":
            values |= read_values(Path(str(text)), target)
    said: dict[str, Any] = {}
    for name, text in pairs:
        top, *path = name.split(".")
        if top in types:
            before = said.get(top, values.get(top))
            said[top] = changed(types[top], before, path, str(text), option[top])
    values |= {name: fit(types[name], value, option[name]) for name, value in said.items()}
    values = {name: values[name] for name in types if name in values}
    if "print_config" in asked:
        print(to_yaml(values), end="")
    elif missing := [option[name] for name in types if name not in values]:
        raise ConfigError(f"{', '.join(missing)} is missing")
    elif target is function:
        function(*[values.pop(name) for name in places], **values)
    else:
        function(target(**values))


# what every command takes besides its own
_EVERYWHERE = {
    "config": "take options from a YAML file; those written here win.",
    "import": "import a Python module first, so that its classes are known.",
    "print_config": "print the options as --config takes them, and run nothing.",
    "help": "print this; --OPTION.help CLASS prints what a class takes.",
}


def _pairs(
    prog: str, argv: Sequence[str], switches: Sequence[str], places: Sequence[str]
) -> list[tuple[str, str | None]]:
    """Return the name of each option that is written, in order, and what is written for it."""
    words, free, options = deque(argv), deque(places), True
    pairs: list[tuple[str, str | None]] = []
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if options and word == "--":
            options = False
        elif not (options and _is_option(word)):
            if not free:
                raise ConfigError(f"unexpected argument {word!r}: {prog} --help lists the options")
            pairs.append((free.popleft(), word))
        elif word == "-h":
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


def _import(module: str) -> None:
    """Import what the command line names, also from the working folder."""
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"--import {module}: expected the name of a module, such as my_rules")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--import {module}: {error}") from error


def _help_on_class(option: str, hint: Any, name: str, default: object) -> None:
    """Print what the class `name` takes that an option of this type may be, or the default's."""
    from altprop.lab.values import Call, base_of, choices, looked_up

    if (base := base_of(hint)) is None:
        raise ConfigError(f"unknown option --{option}.help: --{option} takes no class")
    if not name and default is None:
        raise ConfigError(
            f"--{option}.help: name a class after it, one of {', '.join(choices(base))}"
        )
    cls, _ = looked_up(base, Call(name or type(default).__name__), f"--{option}")
    _help(cls, cls, {}, f"{option}.")


def _help(said: Any, target: Any, more: Mapping[str, str], before: str = "") -> None:
    """Print what the docstring of `said` is about, what `target` takes, and the choices once."""
    from altprop.lab.values import brief, defaults_of, described, kinds_of, types_of

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


def _is_option(word: str) -> bool:
    """Tell an option from a value such as `-`, `-1` or `-.5`."""
    return word.startswith("-") and (word[1:2] == "-" or word[1:2].isalpha())
