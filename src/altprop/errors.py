"""Every error that altprop raises: each says what was given, what was expected, what to write.

The command line turns any `AltpropError` into one line on standard error and exit status 2.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

Problems = list[tuple[str, str]]
"""What is wrong with a model: a place or nothing, and why it is refused."""


class AltpropError(Exception):
    """Base of all errors that altprop raises on purpose."""


class ConfigError(AltpropError, ValueError):
    """An argument, option or configuration key is unknown or out of range."""


class DataError(AltpropError, ValueError):
    """A corpus, token file or prompt cannot be used."""


class CheckpointError(AltpropError, ValueError):
    """A run folder or checkpoint is missing, truncated, foreign or in the way."""


class RuleError(AltpropError, ValueError):
    """A learning rule does not fit the place where it is used."""


class RuleWarning(UserWarning):
    """A learning rule leaves out what its user may expect it to take."""


class ConvergenceError(AltpropError, RuntimeError):
    """A solve did not reach its tolerance."""


class ProcessError(AltpropError, RuntimeError):
    """Another process of the same run has ended, or does not answer."""


@contextmanager
def refusing(error: type[AltpropError], what: str) -> Iterator[None]:
    """Turn whatever an input raises while it is read into one `error` that names the input.

    Errors that say already what is wrong, those of altprop and of files, pass as they are.

    **Arguments:** `what`, the name of the input.
    """
    try:
        yield
    except (AltpropError, OSError):
        raise
    except Exception as fault:
        raise error(f"{what}: {in_a_line(fault)}") from fault


def in_a_line(fault: BaseException, most: int = 300) -> str:
    """Return in one line what an exception says, and its name if that says nothing by itself.

    >>> in_a_line(KeyError("step")), in_a_line(ValueError("too long"))
    ("KeyError: 'step'", 'too long')
    """
    text = " ".join(str(fault).split())
    if not text or isinstance(fault, LookupError):
        text = f"{type(fault).__name__}: {text}" if text else type(fault).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a clause that names the nearest of `known` to `name`, and then all of them.

    >>> suggest("AEPP", ["AEP", "EP"])
    'did you mean AEP? Known: AEP, EP'
    """
    names = sorted(known)
    lowered = {n.lower(): n for n in reversed(names)}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.4)
    start = f"did you mean {lowered[near[0]]}? " if near else ""
    return f"{start}Known: {', '.join(names)}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names as one clause, the first few of many.

    >>> listed("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def told(problems: Problems) -> list[str]:
    """Return one line for each place and its problem, or one for a problem that many places have.

    >>> told([("a", "odd"), ("", "sharded"), ("b", "odd")])
    ['a: odd', 'b: odd', 'sharded']
    """
    places: dict[str, list[str]] = {}
    for place, why in dict.fromkeys(problems):
        places.setdefault(why, []).append(place)
    lines = []
    for why, names in places.items():
        together = [listed(names)] if len(names) > 3 else names
        lines += [f"{name}: {why}" if name else why for name in together]
    return lines


def refuse_subclass(cls: type, root: type, instead: str) -> None:
    """Refuse a class that derives from a concrete one of this library below `root`: they are final.

    What a class claims about itself, a closed form say, would silently be claimed of another one.
    (Classes that torch makes of a module's own, for parametrisations and shards, are no others.)

    **Arguments:** `instead`, what to write, with the name of the concrete class as `{name}`.

    **Raises:** `ConfigError`.
    """
    if cls.__module__ == "abc":  # nobody has written it: type() has made it
        return
    for base in cls.__mro__[1:]:
        ours = base.__module__.partition(".")[0] == "altprop" and issubclass(base, root)
        if ours and not inspect.isabstract(base):
            raise ConfigError(
                f"{cls.__name__} derives from {base.__name__}, which is final: "
                + instead.format(name=base.__name__)
            )


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a `name` that is none of the `known` names of a `what`."""
    return ConfigError(f"unknown {what} {name[:80]!r}: {suggest(name, known)}")
