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
import sys
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import altprop
from altprop.errors import AltpropError, ConfigError, unknown

if TYPE_CHECKING:
    from altprop.lm.config import Parser

Commands = Mapping[str, tuple[str, str]]

COMMANDS: Commands = {
    "train": ("altprop.lm.train:train", "Train a language model by a rule of your choice."),
    "audit": ("altprop.lm.audit_command:audit", "Compare gradients with an exact one."),
    "sample": ("altprop.lm.sample_command:sample", "Write text with a trained model."),
    "explain": ("altprop.lm.explain_command:explain_run", "Show what each parameter receives."),
    "data": ("altprop.lm.data_command:data", "List, describe or encode corpora."),
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
    from altprop.lm.config import Parser

    parameters = list(inspect.signature(function).parameters.values())
    target: Any = function
    if len(parameters) == 1:
        hint = typing.get_type_hints(function)[parameters[0].name]
        target = hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else function
    parser = Parser(prog=prog)
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="Take options from a YAML file; those written here win.",
    )
    if target is function:
        parser.add_function_arguments(function)
        places = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    else:
        parser.description = (inspect.getdoc(function) or "").partition("\n\n")[0]
        parser.add_class_arguments(target)
        places = []
    parser.places = [p.name for p in places]
    shown = [p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p in places]
    parser.usage = " ".join([prog, *shown, "[--option VALUE ...]"])
    try:
        values = parser.built(parser.parse_args(_one_word_each(argv, parser)))
    except SystemExit:  # after help or --print_config
        return
    if target is function:
        function(*[values.pop(p.name) for p in places], **values)
    else:
        function(target(**values))


def _one_word_each(argv: Sequence[str], parser: Parser) -> list[str]:
    """Write each option as one word `--name=value`, and files first so that the others win."""
    words, places, result, options = deque(argv), deque(parser.places), [], True
    while words:
        word = words.popleft()
        name, given, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if options and word == "--":
            options = False
        elif not (options and _is_option(word)):
            if not places:
                raise ConfigError(
                    f"unexpected argument {word!r}: {parser.prog} --help lists the options"
                )
            result.append(f"--{places.popleft()}={word}")
        elif word == "-h":
            result.append("--help")
        elif not name.startswith("--"):
            raise ConfigError(f"unknown option {name}: {parser.prog} --help lists the options")
        elif given:
            result.append(f"--{key}={value}")
        elif parser.hints.get(key) is bool and not (words and words[0] in ("true", "false")):
            result.append(f"--{key}=true")
        elif key in ("help", "print_config") or not words or _is_option(words[0]):
            result.append(f"--{key}")
        else:
            result.append(f"--{key}={words.popleft()}")
    for place in parser.places[: len(parser.places) - len(places)]:
        if sum(word.startswith(f"--{place}=") for word in result) > 1:
            raise ConfigError(
                f"{place.upper()} is given twice, by its place and as --{place}: give it once"
            )
    return sorted(result, key=lambda word: not word.startswith("--config="))


def _is_option(word: str) -> bool:
    """Tell an option from a value such as `-`, `-1` or `-.5`."""
    return word.startswith("-") and (word[1:2] == "-" or word[1:2].isalpha())
