"""The command line as a process: its overview, its status, and outputs that end before it does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import altprop
from altprop.errors import DataError
from altprop.lab.cli import COMMANDS, main

ARGUMENTS = {"--help": 0, "--version": 0, "": 0, "trian": 2, "-x": 2}
SCRIPT = f"""
import sys
from altprop.lab.cli import main
assert [main(word.split()) for word in {[*ARGUMENTS]}] == {[*ARGUMENTS.values()]}
heavy = {{"torch", "numpy", "yaml", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_overview_imports_nothing_heavy_and_answers_at_once() -> None:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert time.perf_counter() - start < 1.0
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2  # one for each of what there is not


def test_the_overview_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for name, (_, line) in COMMANDS.items():
        assert f"  {name:{max(map(len, COMMANDS))}}  {line}\n" in bare


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"altprop {altprop.__version__}\n"


def test_the_console_script_is_main() -> None:
    assert entry_points(group="console_scripts", name="altprop")["altprop"].load() is main


# A command that ends by an error

ERRORS = {
    "data": DataError("the corpus is empty:\nadd text"),
    "file": FileNotFoundError(2, "No such file or directory", "nowhere"),
    "disk": OSError(28, "No space left on device"),
    "interrupt": KeyboardInterrupt(),
    "bug": ZeroDivisionError("a bug"),
    "system": OSError(12, "Cannot allocate memory"),
}
TABLE = {"fail": (f"{__name__}:fail", "Fail.")}


def fail(kind: str, /) -> None:
    print("so far")
    raise ERRORS[kind]


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("data", 2, "error: the corpus is empty: add text"),
        ("file", 2, "error: nowhere: No such file or directory"),
        ("disk", 2, "error: No space left on device: free some; a run goes on with --resume"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_a_command_that_cannot_go_on_ends_with_a_status_and_one_line(
    kind: str, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fail", kind], TABLE) == status
    assert capsys.readouterr() == ("so far\n", f"altprop: {said}\n")


def test_a_bug_keeps_its_traceback_and_asks_to_be_reported() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        main(["fail", "bug"], TABLE)
    assert "fault of altprop and not of your input: please report it" in caught.value.__notes__[0]


def test_an_error_of_the_system_without_a_file_is_a_bug() -> None:
    with pytest.raises(OSError, match="allocate"):
        main(["fail", "system"], TABLE)


# An output that ends


@pytest.mark.parametrize("word", ["--help", "data"])
def test_a_reader_that_went_away_ends_the_output_quietly(word: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "altprop", word], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("word", ["--help", "data"])
def test_output_that_finds_no_space_is_one_line(word: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "altprop", word], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.startswith(b"altprop: error: No space left on device")
    assert done.stderr.count(b"\n") == 1


def test_an_output_that_lacks_a_character_shows_its_escape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("caf\xe9 \u20ac " * 20, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert main(["data", str(tmp_path / "text.txt")]) == 0
    assert b"caf\\xe9 \\u20ac" in out.buffer.getvalue()  # type: ignore[attr-defined]
