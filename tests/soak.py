"""Disturb runs for minutes or hours, and see whether they end as if nothing had happened.

    python tests/soak.py --minutes 5 --seed 0      as long as that, all parts in turn
    python tests/soak.py --cases 200 kills         so many cases of a part

`kills` stops one run by SIGKILL, SIGTERM and SIGHUP at random moments, half of them inside a save,
goes on each time as the messages say, and compares the end with an undisturbed run. `damage` flips,
cuts or empties a file of a run at a random byte: what is done with the run then is right, or
refused in one line. `full` lets the disk be full at every write of a run in turn. What is found
stands in `build/soak.log`; the status is 1 if anything is wrong.

Every attempt is a child of this process, which has imported torch and done nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytest import MonkeyPatch

from altprop.files import write_whole
from altprop.lab import checkpoint, sample_command, train  # noqa: F401
from altprop.lab.cli import main as command
from altprop.lab.identity import options_of
from altprop.lab.settings import TrainConfig
from lm_runs import curve, sentences, tensors, when_logged

options_of(TrainConfig())  # imports what a child would have to
LOG = Path("build/soak.log")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
Act = Callable[[], None]


class Wrong(Exception):
    """Something that must not happen; the folder that shows it is kept."""


class Done(NamedTuple):
    """What became of a child: its status (negative for a signal), its output and its errors."""

    status: int
    out: str
    err: str


def _picture(folder: Path) -> Path:
    write_whole(folder / "curves.png", "a picture")
    return folder


def child(words: list[str], prepare: Act = lambda: None, kill: tuple[float, int] = (0, 0)) -> Done:
    """Run the command line in a child, which may be sent a signal after some seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
                torch.set_num_threads(1)
                train.plot_run = _picture  # matplotlib would take most of the time
                prepare()
                status = command(words)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if kill[1]:
            time.sleep(kill[0])
            os.kill(pid, kill[1])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return Done(status, out.read().decode(), err.read().decode())


def options(steps: int, **changes: Any) -> list[str]:
    """Return the words of a tiny run that has every kind of state."""
    values = {
        **{"data": "text.txt", "d_model": 8, "heads": 2, "context": 8, "batch": 2, "steps": steps},
        **{"warmup": 2, "eval_every": 5, "eval_windows": 4, "final_windows": 8, "sample": 0},
        **{"device": "cpu", "ema": 0.9, "dropout": 0.1, "save_every": 0, **changes},
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def same_end(folder: Path, whole: Path, damaged: bool = False) -> None:
    """Compare how two runs ended, bit for bit; `damaged`, whether that is so of the metrics."""
    for which in ("last", "best"):
        one, other = tensors(folder, which), tensors(whole, which)
        if one.keys() != other.keys() or any(not torch.equal(one[k], other[k]) for k in one):
            raise Wrong(f"{which}.safetensors is another")
    one, other = curve(folder), curve(whole)
    changed = sum(record not in other and "gap_from" not in record for record in one)
    if one != other and (not damaged or changed > 1):
        raise Wrong(f"metrics.jsonl is another: {len(one)} records for {len(other)}")


def one_line(done: Done) -> None:
    """Make sure that a command succeeded, or refused in one line with status 2."""
    if done.status == 0 and "Traceback" not in done.err:
        return
    line = done.err.startswith("altprop: error: ") and done.err.count("\n") == 1
    if done.status != 2 or not line:
        raise Wrong(f"status {done.status}: {done.err[-2000:]}")


def next_words(err: str, start: list[str], folder: str) -> list[str]:
    """Return the command that a refusal says to write instead."""
    if "--overwrite instead of --resume" in err or re.search(r"--out \S+ --overwrite$", err):
        return [*start, "--overwrite"]
    if "already holds a run: add --resume" in err or "--resume" in err:
        return ["train", "--config", f"{folder}/config.yaml", "--resume"]
    return start


def whole_run(steps: int, **changes: Any) -> Path:
    """Return the folder of an undisturbed run."""
    done = child(["train", "--out", "whole", *options(steps, **changes)])
    if done.status != 0:
        raise Wrong(done.err)
    return Path("whole")


# The calls by which anything reaches the disk

CALLS = [(os, "replace"), (os, "fsync"), (os, "write"), (Path, "write_bytes"), (Path, "unlink")]
CALLS += [(Path, "mkdir"), (checkpoint, "save_file"), (os, "open")]


def at_call(number: int, act: Callable[[str, Any], None]) -> Act:
    """Return what lets `act` be called before the call of this number that writes, from 1 on.

    It is given the name of the call and its first arguments.
    """

    def prepare() -> None:
        count = itertools.count(1)
        for place, name in CALLS:
            call = getattr(place, name)

            def counted(*args: Any, call: Any = call, name: str = name, **named: Any) -> Any:
                reads = name == "open" and not args[1] & os.O_CREAT
                if not reads and next(count) >= number:
                    act(name, args)
                return call(*args, **named)

            setattr(place, name, counted)

    return prepare


# The parts


def kills(draw: random.Random, cases: int) -> Iterator[str]:
    """Kill one run again and again; yield what became of each attempt."""
    whole = whole_run(steps := 20 + 8 * cases, eval_every=40)
    start = ["train", "--out", "run", *options(steps, eval_every=40)]
    words, made, ends = start, 0, 0
    while made < cases or ends == 0:
        number = draw.choice(SIGNALS)
        if made >= cases:
            done = child(words)
        elif made % 2:
            done = child(words, kill=(draw.uniform(0.0, 0.6), number))
        else:
            done = child(words, at_call(draw.randint(1, 90), _dying(number, draw.random() < 0.5)))
        expected = {0, -number, 128 + number}
        if done.status in expected and "Traceback" not in done.err:
            made += done.status != 0
            if done.status == 0:
                same_end(Path("run"), whole)
                shutil.rmtree("run")
                ends += 1
            words = start if done.status == 0 or not Path("run").exists() else words
            if words is start and Path("run").exists():
                words = next_words("already holds a run: add --resume", start, "run")
            yield f"{number.name} {done.status}"
        else:
            one_line(done)
            words = next_words(done.err.strip(), start, "run")
    yield f"end: {ends} run(s) of {steps} steps, bit for bit as the undisturbed one"


def _dying(number: int, half: bool) -> Callable[[str, Any], None]:
    """Return what kills the process once; `half`, after half of the checkpoint was written."""
    once: list[int] = []

    def act(name: str, args: Any) -> None:
        if not once:
            once.append(1)
            if half and name == "save_file":
                args[1].write_bytes(b"half of it")
            os.kill(os.getpid(), number)

    return act


def damage(draw: random.Random, cases: int) -> Iterator[str]:
    """Damage one file of a run at a time; yield what became of it."""
    whole = whole_run(14)

    def stop_at_11() -> None:
        when_logged(MonkeyPatch(), 11, lambda: signal.raise_signal(signal.SIGTERM))

    half = child(["train", "--out", "half", *options(14)], stop_at_11)
    if half.status != 143:
        raise Wrong(f"status {half.status}: {half.err}")
    text = child(["sample", "half", "--tokens", "20"]).out
    files = sorted(path.name for path in Path("half").iterdir())
    for case in range(cases):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree("half", "run")
        file = Path("run", files[case % len(files)])
        content = bytearray(file.read_bytes())
        at, how = draw.randrange(max(1, len(content))), draw.choice(["flip", "cut", "empty"])
        if how == "flip" and content:
            content[at] ^= 1 << draw.randrange(8)
        file.write_bytes(content if how == "flip" else content[: at * (how == "cut")])
        written = child(["sample", "run", "--tokens", "20"])
        one_line(written)
        if written.status == 0 and written.out != text:
            raise Wrong(f"{how} {file} at {at}: another text")
        done = child(["train", "--config", "run/config.yaml", "--resume"])
        one_line(done)
        if done.status == 0:
            if file.name == "best.safetensors" and "it is lost until" in done.out:
                shutil.copy("whole/best.safetensors", "run")  # no run can bring that back
            damaged = "metrics.jsonl is not as it was written" in done.out
            same_end(Path("run"), whole, damaged and file.name == "metrics.jsonl")
        yield f"{how} {file} at {at} of {len(content)}: status {done.status}"


def full(draw: random.Random, cases: int) -> Iterator[str]:
    """Let the disk be full at a write, for that time or from then on; yield what became of it.

    Every write of a run in turn, or `cases` of them.
    """
    whole = whole_run(6, eval_every=3)
    start = ["train", "--out", "run", *options(6, eval_every=3)]
    count = 0

    def counting(name: str, args: Any) -> None:
        os.pwrite(tally.fileno(), str(next(numbers)).encode(), 0)

    numbers = itertools.count(1)
    with tempfile.TemporaryFile() as tally:
        child(["train", "--out", "count", *options(6, eval_every=3)], at_call(1, counting))
        tally.seek(0)
        count = int(tally.read())
    every = [(n, stays) for n in range(1, count + 1) for stays in (False, True)]
    chosen = every if cases >= len(every) else sorted(draw.sample(every, cases))
    for number, stays in chosen:
        yield f"write {number} of {count}: {_filled(start, whole, at_call(number, _full(stays)))}"
    for size in (100, 2_000, 20_000, 60_000)[: 1 + cases // 10]:
        prepare = _limited(size)
        yield f"no file past {size} bytes: {_filled(start, whole, prepare)}"
    if cases >= len(every):
        yield from _small_disks(start, whole)


def _filled(start: list[str], whole: Path, prepare: Act) -> str:
    shutil.rmtree("run", ignore_errors=True)
    done = child(start, prepare)
    one_line(done)
    words, said = start, done
    for _ in range(4):  # there is space again: do as the messages say
        if said.status == 0:
            break
        words = next_words(said.err.strip(), start, "run") if Path("run").exists() else start
        said = child(words)
        one_line(said)
    same_end(Path("run"), whole)
    return f"status {done.status} {done.err.strip()[-160:]}"


def _full(stays: bool) -> Callable[[str, Any], None]:
    once: list[int] = []

    def act(name: str, args: Any) -> None:
        reports = name == "write" and args[0] <= 2  # the terminal has space
        if not reports and name != "unlink" and (stays or not once):
            once.append(1)
            if name == "save_file":
                args[1].write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    return act


def _limited(size: int) -> Act:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _small_disks(start: list[str], whole: Path) -> Iterator[str]:
    """Train on file systems that are too small, where this process may make some."""
    for size in (8, 40, 80, 120, 160, 200, 400):
        Path("disk").mkdir(exist_ok=True)
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", "disk"], capture_output=True
        )
        if made.returncode:
            yield "no small file systems here: only root may mount"
            return
        try:
            done = child(["train", "--out", "disk/run", *start[3:]])
            one_line(done)
            if done.status == 0:
                same_end(Path("disk/run"), whole)
            yield f"a disk of {size} KB: status {done.status} {done.err.strip()[-160:]}"
        finally:
            subprocess.run(["umount", "disk"], check=True)


PARTS = {"kills": kills, "damage": damage, "full": full}


def soak(part: str, seed: int, cases: int, say: Callable[[str], None]) -> int:
    """Run so many cases of a part in a new folder; return how many were wrong, and say which."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk to wait for
    home, here = Path.cwd(), Path(tempfile.mkdtemp(prefix=f"soak-{part}-", dir=memory))
    os.chdir(here)
    count, began = 0, time.monotonic()
    try:
        Path("text.txt").write_text(sentences(), encoding="utf-8")
        for told in PARTS[part](random.Random(seed), cases):
            count += 1
            say(f"{part} {told}")
    except Wrong as wrong:
        say(f"{part}, seed {seed}, case {count + 1}: WRONG, see {here}: {wrong}")
        return 1
    finally:
        os.chdir(home)
    say(f"{part}, seed {seed}: {count} cases, none wrong, {time.monotonic() - began:.0f} s")
    shutil.rmtree(here)
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--minutes", type=float, default=0.0, help="go round until then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100, help="of each part, each time round")
    given = parser.parse_args(arguments)
    LOG.parent.mkdir(exist_ok=True)
    end, wrong = time.monotonic() + 60 * given.minutes, 0
    with LOG.open("a", encoding="utf-8") as log, contextlib.suppress(KeyboardInterrupt):

        def say(line: str) -> None:
            log.write(f"{line}\n")
            log.flush()
            if " case" in line:
                print(line, flush=True)

        for seed in itertools.count(given.seed):
            for part in given.parts or PARTS:
                wrong += soak(part, seed, given.cases, say)
            if time.monotonic() >= end:
                break
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
