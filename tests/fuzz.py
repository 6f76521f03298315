"""Put malformed input through the command line, and see whether it is refused as promised.

    python tests/fuzz.py --cases 20000 --seed 0        of every kind as many
    python tests/fuzz.py --cases 1000 --kinds spec     of one kind
    python tests/fuzz.py --only config:17 --seed 0     one case again, with all that it printed

A case is good if the command succeeds, or if it ends with status 2, one line on standard error and
every file as it was. A traceback, a longer or unfiltered message, a changed file and more than ten
seconds of computing (or six times as many of waiting) are failures. Everything is drawn from the
seed, the kind and the number of a case.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import io
import os
import re
import resource
import shutil
import signal
import stat
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import IO, Any

from altprop.lab.cli import main
from altprop.lm.text import prepare
from hostile import GOOD, KINDS
from lm_runs import sentences

LIMIT = 10.0  # seconds of a case
ALARMS = (signal.SIGPROF, signal.SIGALRM)
MEMORY = 12 << 30  # bytes that the process may ask for: what would need more fails at once
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# a run that has begun may end badly; what it kept then is no refusal of its input
BEGUN = re.compile(r"altprop: error: (the run is lost|step \d+: )")


class Hang(BaseException):
    """A case took too long; no `except Exception` holds it back."""


@dataclass
class Tally:
    """What became of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    slowest: str = ""


def make_template(folder: Path) -> None:
    """Fill a folder with good input: a text, a prepared folder, a configuration and a run."""
    (folder / "text.txt").write_text(sentences(60), encoding="utf-8")
    prepare(folder / "text.txt", folder / "tokens")
    with working_in(folder), contextlib.redirect_stdout(io.StringIO()):
        status = main([*TRAIN, "--out", "run"])
        assert status == 0, "the good input must be accepted"
    shutil.copy(folder / "run" / "config.yaml", folder / "good.yaml")


def template_of(kind: str, template: Path) -> Path:
    """Return the folder of good input for a kind: that of all, or with what it needs beside it."""
    if kind not in GOOD:
        return template
    own = template.with_name(f"{template.name}-{kind}")
    shutil.copytree(template, own)
    with working_in(own), contextlib.redirect_stdout(io.StringIO()):
        GOOD[kind](TRAIN)
    return own


SIZES = {"d_model": 8, "heads": 2, "context": 8, "batch": 2, "steps": 1, "warmup": 0}
LOOKS = {"eval_every": 1, "eval_windows": 2, "final_windows": 2, "sample": 0, "device": "cpu"}
DRAWING = [("altprop.lab.train", "plot_run"), ("altprop.lab.sweep.command", "plot_sweep")]
TRAIN = ["train", "--data", "text.txt"]
TRAIN += [word for k, v in {**SIZES, **LOOKS}.items() for word in (f"--{k}", str(v))]


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in a folder that is also the home, without pictures, under a watchdog."""
    before, home = os.getcwd(), os.environ.get("HOME", "")
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
    alarms = [signal.signal(number, _hang) for number in ALARMS]
    drawn = [(importlib.import_module(module), name) for module, name in DRAWING]
    draw = [getattr(module, name) for module, name in drawn]
    for module, name in drawn:
        setattr(module, name, lambda *given: given[-1])
    try:
        yield
    finally:
        for (module, name), function in zip(drawn, draw, strict=True):
            setattr(module, name, function)
        for number, alarm in zip(ALARMS, alarms, strict=True):
            signal.signal(number, alarm)
        os.environ["HOME"] = home
        os.chdir(before)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang("no end in time")


def tree(folder: Path) -> dict[str, Any]:
    """Return everything below a folder: the content of files, the targets of links, other kinds."""
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            kind = stat.S_IFMT(os.lstat(path).st_mode)
            content: Any = kind
            if kind == stat.S_IFLNK:
                content = os.readlink(path)
            elif kind == stat.S_IFREG:
                with open(path, "rb") as file:
                    content = file.read()
            found[os.fsdecode(os.path.relpath(path, os.fsencode(folder)))] = content
    return found


@contextlib.contextmanager
def descriptors() -> Iterator[tuple[int, IO[bytes]]]:
    """Take what a library writes to standard error by itself; give the descriptor as it was too."""
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield before, file
        finally:
            os.dup2(before, 2)
            os.close(before)


def streams() -> tuple[io.TextIOWrapper, io.TextIOWrapper]:
    """Return an output and an error stream that encode as those of a process do."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    return out, err


def said(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "surrogatepass")  # type: ignore[attr-defined]


def run_case(kind: str, name: str, template: Path) -> tuple[str, float, str]:
    """Make a case in a fresh folder and run it; return its outcome, its seconds and all it said."""
    with tempfile.TemporaryDirectory(dir=template.parent) as made:
        here = Path(made) / "case"
        shutil.copytree(template, here, symlinks=True)
        argv = KINDS[kind](Random(name), here, TRAIN)
        before = tree(here)
        out, err = streams()
        wrong, status, began = "", -1, time.process_time()
        with (
            working_in(here),
            descriptors() as (screen, beside),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            faulthandler.dump_traceback_later(9 * LIMIT, exit=True, file=screen)
            signal.setitimer(signal.ITIMER_PROF, LIMIT)
            signal.setitimer(signal.ITIMER_REAL, 6 * LIMIT)
            try:
                status = argv() if callable(argv) else main(argv)
            except BaseException as error:  # whatever it is, it is what this looks for
                last = traceback.extract_tb(error.__traceback__)[-1]
                wrong = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
                traceback.print_exc()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.cancel_dump_traceback_later()
                beside.seek(0)
                err.write(beside.read().decode("utf-8", "replace"))
        seconds = time.process_time() - began
        wrong = wrong or judge(status, said(out), said(err), before, tree(here))
        outcome = wrong or ("refused" if status == 2 else "succeeded")
        return outcome, seconds, f"argv {argv!r}\nout {said(out)!r}\nerr {said(err)}"


def judge(status: int, out: str, err: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return what is wrong with the end of a case, or nothing."""
    if found := OBEYED.search(out + err):
        return f"unfiltered {found[0]!r}"
    if status == 0:
        return "traceback in a success" if "Traceback" in err else ""
    if status != 2:
        return f"status {status}"
    if not err.startswith("altprop: error: ") or err.count("\n") != 1 or err[-1] != "\n":
        return "not one line"
    if len(err) > 2000:
        return "a line of more than 2000 characters"
    if before != after and not BEGUN.match(err):
        changed = {k for k in {*before, *after} if before.get(k, "") != after.get(k, "")}
        return f"changed {sorted(changed)[0]!r}"
    return ""


def fuzz(
    cases: int,
    seed: int,
    only: str = "",
    kinds: Sequence[str] = tuple(KINDS),
    begun: Callable[[str], object] = len,
) -> int:
    """Run cases, each told to `begun`, and print what became of them; return how many failed."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    failures: dict[str, list[str]] = defaultdict(list)
    made = Path(tempfile.mkdtemp())
    try:
        (template := made / "template").mkdir()
        os.environ["MPLCONFIGDIR"] = str(made)  # its cache is made once, and before the cases
        if "words" in kinds:  # of audits that draw
            importlib.import_module("matplotlib.font_manager")
        make_template(template)
        templates = {kind: template_of(kind, template) for kind in kinds}
        todo = [f"{kind}:{n}" for n in range(-(-cases // len(kinds))) for kind in kinds]
        todo = [only] if only else todo
        for name in todo:
            kind = name.partition(":")[0]
            begun(name)
            outcome, seconds, everything = run_case(kind, f"{seed}/{name}", templates[kind])
            tally = tallies[kind]
            if outcome not in ("refused", "succeeded"):
                failures[outcome].append(name)
                outcome = "failed"
            tally.outcomes[outcome] += 1
            if seconds > tally.longest:
                tally.longest, tally.slowest = seconds, name
            if only:
                print(everything)
    finally:
        shutil.rmtree(made)
    for kind, tally in tallies.items():
        found = tally.outcomes
        print(
            f"{kind:12} {found.total():6} cases  {found['succeeded']:6} succeeded  "
            f"{found['refused']:6} refused  {found['failed']:4} failed  "
            f"longest {tally.longest:.2f} s ({tally.slowest})"
        )
    for what, names in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"FAILED {len(names):5} times: {what}, such as --only {names[0]}")
    return sum(map(len, failures.values()))


def survived(run: Callable[[Callable[[str], object]], int]) -> int:
    """Run in a process of its own; where a case ends that, say which; return how many failed."""
    with tempfile.TemporaryFile() as note:
        child = os.fork()
        if child == 0:
            number = note.fileno()
            raise SystemExit(run(lambda name: os.pwrite(number, f"{name:80}".encode(), 0)) > 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            what = signal.Signals(-status).name
            print(f"FAILED: the process died of {what} in --only {note.read().decode().strip()}")
        return abs(status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--only", default="", help="one case, such as config:17")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    kinds = [given.only.partition(":")[0]] if given.only else given.kinds
    raise SystemExit(survived(partial(fuzz, given.cases, given.seed, given.only, kinds)) > 0)
