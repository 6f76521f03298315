"""The command line: a command is a function, and its options are what the function takes.

The table below is all that this file knows of the commands. Listing them imports nothing else; only
a command that runs is imported, so that `altprop --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altprop
from altprop.errors import AltpropError, ConfigError, unknown

Commands = Mapping[str, tuple[str, str]]

COMMANDS: Commands = {
    "train": ("altprop.lm.train:train", "Train a language model by a rule of your choice."),
    "audit": ("altprop.lm.audit_command:audit", "Compare a rule's gradient with an exact one."),
    "sample": ("altprop.lm.sample_command:sample", "Write text with a trained model."),
    "data": ("altprop.lm.data_command:data", "Fetch a corpus and turn it into tokens."),
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
        # Python flushes once more when it exits; what is left has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    return 0


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
        _Command(f"altprop {argv[0]}", function).run(argv[1:])
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


class _Command:
    """One command: the options that its function takes, read from words and files.

    Args:
        prog: how the command is called.
        function: takes its options as parameters, the keyword-only ones by name and the others by
            place or name; or takes one dataclass, whose fields then are the options.
    """

    def __init__(self, prog: str, function: Callable[..., Any]) -> None:
        from altprop.lm.draft import command_draft

        self.prog = prog
        self.function = function
        self.draft, self.is_config = command_draft(function)
        self.places = [p.name for p in self.draft.parameters.values() if p.positional]
        self.wanted = ""

    def run(self, argv: Sequence[str]) -> None:
        """Read the words `argv`, then run the function, or print what was asked for instead."""
        from altprop.lm.config import config_dict, plain, to_yaml
        from altprop.lm.usage import usage

        self._read(argv)
        if self.wanted == "help":
            print(usage(self.prog, self.function, self.draft), end="")
        elif self.is_config:
            config = self.draft.build()
            if self.wanted == "print_config":
                print(to_yaml(config_dict(config)), end="")
            else:
                self.function(config)
        else:
            values = self.draft.arguments()
            if self.wanted == "print_config":
                print(to_yaml({key: plain(value) for key, value in values.items()}), end="")
            else:
                places = [values.pop(name) for name in self.places]
                self.function(*places, **values)

    def _read(self, argv: Sequence[str]) -> None:
        from altprop.lm.config import load_mapping
        from altprop.lm.draft import Spot

        files, rest = _split_config_files(argv)
        for file in files:  # first, so that the words have the last word
            self.draft = self.draft.updated(load_mapping(Path(file)), Spot(source=file))
        words, places = deque(rest), deque(self.places)
        while words:
            word = words.popleft()
            if word == "--":
                for word in words:
                    self._place(word, places)
                return
            if _is_option(word):
                self._option(word, words)
            else:
                self._place(word, places)

    def _option(self, word: str, words: deque[str]) -> None:
        """Take the option `word`, and its value from the front of the `words` that follow."""
        from altprop.lm.draft import Text, find

        name, given, value = word.partition("=")
        path = name.lstrip("-").replace("-", "_").split(".")
        if name == "-h" or path[0] in ("help", "print_config"):
            # Help wins, and is given only now that the options before it have chosen classes.
            self.wanted = "help" if path[0] != "print_config" else self.wanted or "print_config"
            return
        if not name.startswith("--"):
            raise ConfigError(f"unknown option {name}: {self.prog} --help lists the options")
        parameter = find(self.draft, path)
        if not given:
            if parameter.hint is bool and not (words and words[0] in ("true", "false")):
                value = "true"
            else:
                value = _value(name, words)
        raw: Any = Text(value)
        for key in reversed(path):
            raw = {key: raw}
        self.draft = self.draft.updated(raw)

    def _place(self, word: str, places: deque[str]) -> None:
        """Take the `word` as the value of the next of the `places`."""
        from altprop.lm.draft import Text

        if not places:
            raise ConfigError(f"unexpected argument {word!r}: {self.prog} --help lists the options")
        self.draft = self.draft.updated({places.popleft(): Text(word)})


def _split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the `--config FILE` pairs out of the words of a command."""
    files, rest, words = [], [], deque(argv)
    while words:
        name, given, value = (word := words.popleft()).partition("=")
        if name == "--config":
            files.append(value if given else _value(name, words))
        elif word == "--":
            rest += [word, *words]
            break
        else:
            rest.append(word)
    return files, rest


def _value(name: str, words: deque[str]) -> str:
    if not words or words[0].startswith("--") or words[0] == "-h":
        raise ConfigError(f"{name} expects a value: write {name} VALUE or {name}=VALUE")
    return words.popleft()


def _is_option(word: str) -> bool:
    """Tell an option from a value such as `-`, `-1` or `-.5`."""
    return word.startswith("-") and word[1:2].strip("0123456789.") != ""
