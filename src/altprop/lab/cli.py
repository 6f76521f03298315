"""The command line: a command is a function, and its options are what the function takes.

The table below is all that this file knows of the commands. Listing them imports nothing else; only
a command that runs is imported, so that `altprop --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import inspect
import io
import os
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altprop
from altprop.errors import AltpropError, ConfigError, ProcessError, in_a_line, unknown
from altprop.terminal import printable

Commands = Mapping[str, tuple[str, str]]

COMMANDS: Commands = {
    "train": ("altprop.lab.train:train", "Train a language model by a rule of your choice."),
    "compare": ("altprop.lab.compare:compare", "Compare learning rules on a task."),
    "sweep": ("altprop.lab.sweep:sweep", "Search the options of training for the best."),
    "audit": ("altprop.lab.audit_command:audit", "Compare gradients with an exact one."),
    "sample": ("altprop.lab.sample_command:sample", "Write text with a trained model."),
    "explain": ("altprop.lab.explain_command:explain_run", "Show what each parameter receives."),
    "report": ("altprop.lab.report_command:report", "Show a run or a comparison on one page."),
    "reproduce": ("altprop.lab.reproduce.command:reproduce", "Measure published figures again."),
    "data": ("altprop.lab.data_command:data", "List, describe or encode corpora."),
}


def main(argv: Sequence[str] | None = None, commands: Commands = COMMANDS) -> int:
    """Run `altprop` and return its exit status.

    The status is 0, 2 for bad input (one line on standard error says what to write instead), 130
    after an interrupt, 143 or 129 where SIGTERM or SIGHUP ended a run, and 141 when the reader of
    the output went away. Anything else that goes wrong is a bug and keeps its traceback, with the
    request to report it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack a character of a text
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(sys.argv[1:] if argv is None else argv, commands)
        sys.stdout.flush()
    except AltpropError as error:
        return _fail(str(error), of_all=not isinstance(error, ProcessError))
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # of a terminal that has been closed
            print("altprop: interrupted", file=sys.stderr)
        return getattr(error, "status", 130)  # of another signal, where a run was asked to stop
    except BrokenPipeError:
        _end_output()
        return 141
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # so rich ends when its reader has gone
            return 141
        raise
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end_output()
        return _fail(f"{error.strerror}: free some; a run goes on with --resume")
    except Exception as error:
        if _lacks_memory(error):
            return _fail(
                f"not enough memory ({in_a_line(error)}): take a smaller model, context or batch"
            )
        error.add_note(
            "altprop: this is a fault of altprop and not of your input: please report it with the "
            "lines above and the command"
        )
        raise
    return 0


def _lacks_memory(error: Exception) -> bool:
    """Tell what torch, numpy or Python raise where a size is past what there is."""
    of_torch = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(said in str(error) for said in of_torch)


def _end_output() -> None:
    """Write what standard output still holds, or drop it: Python flushes it again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, of_all: bool = False) -> int:
    """Say why a command fails, in one line; of many processes that fail alike the first says it."""
    if of_all and os.environ.get("RANK", "0") != "0":
        return 2
    line = printable(" ".join(message.split("\n")))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print("altprop: error:", line, file=sys.stderr)
    return 2


def _run(argv: Sequence[str], commands: Commands) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(commands))
    elif argv[0] == "--version":
        print(f"altprop {altprop.__version__}")
    elif argv[0] in commands:
        if (size := os.environ.get("WORLD_SIZE", "1")) != "1" and argv[0] not in _IN_MANY:
            raise ConfigError(
                f"{argv[0]} is for one process, and WORLD_SIZE is {size}: start it without "
                f"torchrun, which is for {', '.join(_IN_MANY)}"
            )
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
    their name. If the first is a dataclass, the fields of that are the options, and what else the
    function takes is for Python alone.
    """
    from altprop.lab.choices import defaults_of, no_option, types_of
    from altprop.lab.config import WRITES, read_values, to_yaml
    from altprop.lab.help import help_on_class, print_help
    from altprop.lab.values import fit
    from altprop.lab.words import changed, pairs_of

    parameters = list(inspect.signature(function).parameters.values())
    target: Any = function
    if parameters:
        hint = typing.get_type_hints(function)[parameters[0].name]
        if dataclasses.is_dataclass(hint) and not inspect.isabstract(hint):  # none to choose from
            target = hint
    places = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and target is function]
    types, values = types_of(target), defaults_of(target)
    option = {name: name.upper() if name in places else f"--{name}" for name in types}
    pairs = pairs_of(prog, argv, [name for name, hint in types.items() if hint is bool], places)
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
            help_on_class(name, types.get(name), asked[helped[0]], values.get(name))
        else:
            shown = [f"[{p.upper()}]" if p in values else p.upper() for p in places]
            print("usage:", *[prog, *shown, "[--option VALUE ...]"], end="\n\n")
            print_help(function, target, _EVERYWHERE)
        return
    for name, text in pairs:
        if name == "config":
            values |= read_values(Path(str(text)), target, unsaid=WRITES)
    said: dict[str, Any] = {}
    for name, text in pairs:
        top, *path = name.split(".")
        if top in types:
            before = said.get(top, values.get(top))
            said[top] = changed(types[top], before, path, str(text), option[top])
    values |= {name: fit(types[name], value, option[name]) for name, value in said.items()}
    values = {name: values[name] for name in types if name in values}
    if "print_config" in asked:
        print(to_yaml({k: v for k, v in values.items() if k not in WRITES}), end="")
    elif missing := [option[name] for name in types if name not in values]:
        raise ConfigError(f"{', '.join(missing)} is missing")
    elif target is function:
        function(*[values.pop(name) for name in places], **values)
    else:
        function(target(**values))


_IN_MANY = ("train",)  # commands that many processes make together
_LONGEST = 1500  # characters of an error that are shown
# what every command takes besides its own
_EVERYWHERE = {
    "config": "take options from a YAML file; those written here win.",
    "import": "import a Python module first, so that its classes are known.",
    "print_config": "print the options as --config takes them, and run nothing.",
    "help": "print this; --OPTION.help CLASS prints what a class takes.",
}


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
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {in_a_line(error)}"
        raise ConfigError(
            f"--import {module}: {why} ({last.filename}, line {last.lineno})"
        ) from error
