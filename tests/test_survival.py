"""Whatever ends a run, it goes on from its last whole checkpoint; `soak.py` does it at length."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from altprop import CheckpointError, ConvergenceError
from altprop.lab import checkpoint, signals
from altprop.lab.cli import main
from altprop.lab.display import Lasting
from altprop.lab.folder import LOCK
from altprop.lab.guard import Guard
from altprop.lab.lock import Lock
from altprop.lab.signals import Stopped, interruptible
from altprop.lab.train import train
from lm_runs import (
    assert_equal_bits,
    curve,
    small,
    step_of,
    steps,
    tensors,
    tree,
    when_logged,
    words,
)

pytestmark = pytest.mark.usefixtures("no_curves", "as_in_a_terminal")

GPT: dict[str, Any] = {"model": "gpt", "layers": 1}
LAST, BEFORE = "last.safetensors", "last.previous.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs of 8 steps: `whole`, and `half`, which was told to stop after 6."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        train(small(folder / "whole", **GPT))
        when_logged(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            train(small(folder / "half", **GPT))
    return folder


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Path:
    shutil.copy(stopped / "text.txt", tmp_path)
    return Path(shutil.copytree(stopped / "half", tmp_path / "half"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


# Signals


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_lets_the_step_end_and_be_saved_and_gives_the_customary_status(
    name: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    when_logged(monkeypatch, 3, lambda: signal.raise_signal(number))
    config = small(tmp_path / "run", **GPT)
    assert main(["train", *words(config, "model", "layers")]) == status
    assert signal.getsignal(number) is handler
    assert step_of(tmp_path / "run") == len(steps(tmp_path / "run")) == 3


def test_a_run_that_was_told_to_stop_goes_on_bit_for_bit(half: Path, stopped: Path) -> None:
    assert main(["train", "--config", str(half / "config.yaml"), "--resume"]) == 0
    assert curve(half) == curve(stopped / "whole")
    for which in ("last", "best"):
        assert_equal_bits(tensors(half, which), tensors(stopped / "whole", which))


def test_a_second_signal_ends_at_once_but_a_closed_terminal_says_so_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Stopped) as caught, interruptible() as asked:
        assert asked() == 0
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        signal.raise_signal(signal.SIGHUP)
    assert caught.value.status == 129
    with interruptible() as asked:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert asked() == signal.SIGHUP
        later = signals.time.monotonic() + 2
        monkeypatch.setattr(signals.time, "monotonic", lambda: later)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGHUP)


def test_under_nohup_a_closed_terminal_is_no_reason_to_stop() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_than_the_main_one_trains_without_signals() -> None:
    seen: list[int] = []

    def within() -> None:
        with interruptible() as asked:
            seen.append(asked())

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert seen == [0]


# Checkpoints


def test_a_checkpoint_is_written_between_evaluations_and_changes_no_figure(tmp_path: Path) -> None:
    for name, every in (("often", 0.0), ("seldom", 60.0)):
        train(small(tmp_path / name, **GPT, save_every=every, ema=0.5, dropout=0.1))
    assert curve(tmp_path / "often") == curve(tmp_path / "seldom")
    assert_equal_bits(tensors(tmp_path / "often"), tensors(tmp_path / "seldom"))
    assert [step_of(tmp_path / name, "last.previous") for name in ("often", "seldom")] == [7, 4]


@pytest.mark.parametrize("fault", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_resume_falls_back_to_the_checkpoint_before_and_says_why(
    fault: Callable[[Path], object],
    half: Path,
    stopped: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(half / LAST)
    train(small(half, **GPT, resume=True))
    said = capsys.readouterr().out
    assert f"going on from {half / BEFORE}, the checkpoint before: " in said
    assert ("there is no last.safetensors" in said) or (f"{half / LAST}: " in said)
    assert curve(half) == curve(stopped / "whole")
    assert_equal_bits(tensors(half), tensors(stopped / "whole"))


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(half / LAST)
    when_logged(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(small(half, **GPT, resume=True))
    assert [step_of(half), step_of(half, "last.previous")] == [5, 4]


def test_without_any_whole_checkpoint_resume_names_every_fault_and_changes_nothing(
    half: Path,
) -> None:
    flip(half / LAST)
    flip(half / BEFORE)
    before = tree(half)
    with pytest.raises(CheckpointError) as caught:
        train(small(half, **GPT, resume=True))
    said = str(caught.value)
    assert said.count(": damaged: ") == 2 and "write --overwrite instead of --resume" in said
    assert tree(half) == before


@pytest.mark.parametrize("key", ["batches", "progress", "metrics", "identity"])
def test_a_checkpoint_that_lacks_something_is_refused_before_anything_changes(
    key: str, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = checkpoint.load

    def lacking(path: Path) -> checkpoint.Checkpoint:
        saved = load(path)
        (saved.extra if key == "batches" else saved.notes).pop(key)
        return saved

    before = tree(half)
    monkeypatch.setattr(checkpoint, "load", lacking)
    with pytest.raises(CheckpointError, match="does not fit this run|which run it is of"):
        train(small(half, **GPT, resume=True))
    assert tree(half) == before


def test_a_lost_best_is_said(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(half / "best.safetensors")
    train(small(half, **GPT, resume=True))
    assert "best.safetensors: damaged: " in capsys.readouterr().out


def test_a_step_that_ends_the_run_leaves_what_was_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that `--on_failure skip` goes on as if it had been said from the start."""
    check = Guard.check

    def spoiled(
        self: Guard, model: Any, optimiser: Any, loss: float, progress: Any, passes: Any
    ) -> Any:
        if progress.step == 2:  # the norm is found out only after the stabiliser has drawn
            next(model.parameters()).grad.fill_(float("inf"))
        return check(self, model, optimiser, loss, progress, passes)

    monkeypatch.setattr(Guard, "check", spoiled)
    train(small(tmp_path / "whole", steps=4))
    folder = tmp_path / "run"
    with pytest.raises(ConvergenceError, match="step 3: .* are saved: altprop train .*--resume"):
        train(small(folder, steps=4, on_failure="stop"))
    assert step_of(folder) == 2
    train(small(folder, steps=4, resume=True))
    assert curve(folder) == curve(tmp_path / "whole")
    assert_equal_bits(tensors(folder), tensors(tmp_path / "whole"))


# The folder


def test_a_second_process_on_a_run_is_refused_until_the_first_one_is_dead(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"import fcntl, sys; f = open({str(half / LOCK)!r}); fcntl.flock(f, fcntl.LOCK_EX)"
    code += "; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None and other.stdout.readline()
        before = tree(half)
        for how in ("--resume", "--overwrite"):
            assert main(["train", *words(small(half, **GPT), "model", "layers"), how]) == 2
            assert f"{half} is in use by another process" in capsys.readouterr().err
        assert tree(half) == before
        other.kill()
    Lock(half / LOCK).close()


def test_where_there_are_no_locks_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("altprop.lab.lock.flock", none)
    train(small(tmp_path / "run", **GPT, steps=1))
    assert "cannot be locked: start no second process on it" in capsys.readouterr().out


@pytest.mark.parametrize("made", [0, 1, 2])
def test_a_crash_at_the_very_start_leaves_what_can_be_started_or_overwritten(
    made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, replace, count = tmp_path / "run", os.replace, iter(range(9))

    def dying(*paths: Any) -> None:
        if next(count) == made:
            raise SystemError("power")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(SystemError):
            train(small(folder, **GPT, steps=1))
    assert any(".part" in name for name in os.listdir(folder))
    argv = ["train", *words(small(folder, **GPT, steps=1), "model", "layers")]
    status = main(argv)
    if made:
        assert status == 2 and "--overwrite" in capsys.readouterr().err
        assert main([*argv, "--resume"]) == 2
        assert "no checkpoint yet to go on from: write --overwrite" in capsys.readouterr().err
        status = main([*argv, "--overwrite"])
    assert status == 0
    assert not any(".part" in name for name in os.listdir(folder))


def test_the_record_says_what_made_each_session_and_names_no_machine(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    train(small(half, **GPT, resume=True))
    assert "this session has threads 7 instead of 1: its figures may" in capsys.readouterr().out
    first, second = json.loads((half / "run.json").read_text())["sessions"]
    assert (first["from_step"], first["to_step"]) == (0, 6)
    assert (second["from_step"], second["to_step"]) == (6, 8)
    assert second["seconds"] >= first["seconds"]
    keys = {"altprop", "torch", "python", "device", "threads", "command", "text"}
    assert keys <= first.keys() and os.uname().nodename not in json.dumps(first["torch"])


def test_a_disk_that_is_full_leaves_the_checkpoint_before_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Path
) -> None:
    save, count = checkpoint.save_file, iter(range(99))

    def full(tensors: Any, path: Path, header: Any) -> None:
        if next(count) == 2:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(tensors, path, header)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left on device.: free .* --resume"):
            train(small(folder, **GPT))
    train(small(folder, **GPT, resume=True))
    assert curve(folder) == curve(stopped / "whole")


# The display


class Gone(io.StringIO):
    """A stream whose reader or terminal goes away after some writes."""

    left = 3

    def write(self, text: str) -> int:
        Gone.left -= 1
        if Gone.left < 0:
            raise self.trouble
        return super().write(text)

    trouble: Exception = BrokenPipeError()


@pytest.mark.parametrize("trouble", [BrokenPipeError(), OSError(5, "EIO"), ValueError("closed")])
def test_a_run_goes_on_without_its_reader(
    trouble: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gone, "trouble", trouble)
    monkeypatch.setattr(Gone, "left", 3)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert train(small(tmp_path / "run", **GPT, steps=2)).folder.exists()
    assert step_of(tmp_path / "run") == 2


def test_what_python_writes_when_it_exits_goes_nowhere_too() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stream:
        lasting = Lasting(stream)
        lasting.write("a line")
        lasting.flush()
        lasting.write("another")
    assert not lasting.isatty()  # and the stream has been closed without an error


def test_a_stream_that_is_there_gets_everything() -> None:
    stream = io.StringIO()
    lasting = Lasting(stream)
    assert lasting.write("text") == 4 and stream.getvalue() == "text"
    assert not lasting.isatty()
    with pytest.raises(UnicodeEncodeError):  # which says what the terminal cannot show
        Lasting(io.TextIOWrapper(io.BytesIO(), "ascii")).write("ß")


# In short, what the soak does at length


def test_disturbed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "soak.py", "--cases", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("none wrong") == 3
