"""What callbacks and trackers are told of a run, and what trackers keep of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from altprop import ConfigError
from altprop.lab import checkpoint
from altprop.lab.callbacks import Begin, Callback, End
from altprop.lab.cli import main
from altprop.lab.folder import TRACKERS
from altprop.lab.reporting.metrics import read_metrics
from altprop.lab.train import train
from lm_runs import assert_equal_bits, curve, small, tensors, tree, words

pytestmark = pytest.mark.usefixtures("no_curves")

INSTALLED = tuple(name for name in TRACKERS if importlib.util.find_spec(name))


class Heard(Callback):
    """Keeps what it is told, and raises at a step."""

    def __init__(self, raises_at: int = 0, method: str = "on_step") -> None:
        self.told: list[tuple[str, Any]] = []
        self._at, self._method = raises_at, method

    def _hear(self, method: str, value: Any, step: int) -> None:
        self.told.append((method, value))
        if (method, step) == (self._method, self._at):
            raise ZeroDivisionError("of a callback")

    def on_begin(self, begin: Begin) -> None:
        self._hear("on_begin", begin, begin.step)

    def on_step(self, record: Mapping[str, Any]) -> None:
        self._hear("on_step", record, record["step"])

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        self._hear("on_evaluation", record, record["step"])

    def on_end(self, end: End) -> None:
        self._hear("on_end", end, end.step)

    def records(self) -> list[dict[str, Any]]:
        """Return what it was told of as the run writes it."""
        told = [value.record if method == "on_end" else value for method, value in self.told[1:]]
        return [dict(record) for record in told if record]


# Callbacks


def test_a_callback_is_told_what_the_run_writes_and_cannot_change_it(tmp_path: Path) -> None:
    heard = Heard(-1)
    result = train(small(tmp_path / "run", stabiliser=None, freeze=("head.*",)), [heard])
    assert heard.records() == read_metrics(tmp_path / "run")
    methods = [method for method, _ in heard.told]
    assert methods[0] == "on_begin" and methods[-1] == "on_end" and "on_evaluation" in methods
    begin, end = heard.told[0][1], heard.told[-1][1]
    assert (begin.folder, begin.step, begin.options["freeze"]) == (tmp_path / "run", 0, ("head.*",))
    assert end.record["final_validation_loss"] == result.final_loss and end.error is None
    for record in (heard.told[1][1], begin.options, end.record):
        with pytest.raises(TypeError):
            record["step"] = 0
    for value in (begin, end):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.step = 0


@pytest.mark.parametrize(
    ("method", "step"),
    [("on_begin", 0), ("on_step", 3), ("on_step", 4), ("on_evaluation", 4), ("on_end", 8)],
)
def test_what_a_callback_raises_ends_the_run_and_it_goes_on_as_if_undisturbed(
    method: str, step: int, tmp_path: Path
) -> None:
    train(small(tmp_path / "whole"))
    raises, other = Heard(step, method), Heard(-1)
    with pytest.raises(ZeroDivisionError, match="of a callback"):
        train(small(tmp_path / "cut"), [other, raises])
    saved = checkpoint.load(tmp_path / "cut" / "last.safetensors")
    assert saved.notes["progress"]["step"] == step
    assert other.told[-1][0] == "on_end"  # it may have something open
    if method != "on_end":
        assert isinstance(other.told[-1][1].error, ZeroDivisionError)
    train(small(tmp_path / "cut", resume=True))
    if method != "on_end":  # where the figure at the end was measured twice
        assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert_equal_bits(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert_equal_bits(tensors(tmp_path / "cut", "best"), tensors(tmp_path / "whole", "best"))


def test_a_second_fault_at_the_end_stands_beside_the_first(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        train(small(tmp_path / "run"), [Heard(2), last := Heard(2, "on_end")])
    assert [value["step"] for method, value in last.told if method == "on_step"] == [1, 2]
    assert caught.value.__notes__ == ["and then ZeroDivisionError: of a callback"]


# Trackers


class Sockets(Callback):
    """Looks at every evaluation for sockets of this process and of those that it has started."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._before = set(self._open(os.getpid()))  # of the tests before

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        processes = [os.getpid()]
        for process in processes:  # it grows
            for task in Path(f"/proc/{process}/task").iterdir():
                processes += map(int, (task / "children").read_text().split())
        assert len(processes) > ("trackio" in INSTALLED)  # which has one of its own
        for process in processes:
            self.seen += set(self._open(process)) - self._before

    def _open(self, process: int) -> Iterator[str]:
        """Yield the inodes of a process's sockets of the network, with their addresses."""
        links = []
        for file in Path(f"/proc/{process}/fd").iterdir():
            try:
                links.append(os.readlink(file))
            except FileNotFoundError:
                continue
        for kind in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/{process}/net/{kind}").read_text().splitlines()[1:]:
                _, local, remote, *_, inode = line.split()[:10]
                if f"socket:[{inode}]" in links:
                    yield f"{inode}: {local} {remote}"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that every tracker follows; it is killed, as it were, after step 5, and resumed."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    sockets = Sockets()
    config = small(folder, log=INSTALLED, quiet=True)
    with pytest.raises(ZeroDivisionError):
        train(config, [sockets, Heard(5)])
    train(dataclasses.replace(config, resume=True), [sockets])
    assert sockets.seen == []
    return folder


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in record.items() if k != "step"}


def written(folder: Path) -> dict[tuple[int, str], float]:
    """Return every figure of a run by its step and name."""
    records = read_metrics(folder)
    return {(r["step"], name): value for r in records for name, value in numbers(r).items()}


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="tensorboard is not installed")
def test_tensorboard_holds_every_figure_once_also_of_a_resumed_run(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tensorboard"), {"scalars": 0})
    events.Reload()
    found = [(e.step, name, e.value) for name in events.Tags()["scalars"]
             for e in events.Scalars(name)]  # fmt: skip
    assert len(found) == len(written(tracked))
    assert {(s, n): v for s, n, v in found} == pytest.approx(written(tracked), rel=1e-6)
    assert events.Tags()["tensors"] == ["config/text_summary"]


@pytest.mark.skipif("trackio" not in INSTALLED, reason="trackio is not installed")
def test_trackio_holds_every_figure_once_in_one_run(tracked: Path) -> None:
    with sqlite3.connect(tracked / "trackio" / "altprop.db") as held:
        rows = held.execute("SELECT run_id, run_name, step, metrics FROM metrics").fetchall()
    held.close()
    assert len({run for run, *_ in rows}) == 1 and {name for _, name, *_ in rows} == {"run"}
    assert len(rows) == len(read_metrics(tracked))
    found = {(step, name): value for *_, step, text in rows
             for name, value in json.loads(text).items()}  # fmt: skip
    assert found == pytest.approx(written(tracked), rel=1e-12)


@pytest.mark.skipif("wandb" not in INSTALLED, reason="wandb is not installed")
def test_wandb_holds_every_loss_in_one_offline_run(tracked: Path) -> None:
    first, second = sorted((tracked / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    held = [next(path.glob("*.wandb")).read_bytes() for path in (first, second)]
    losses = [(r["step"], json.dumps(value).encode()) for r in read_metrics(tracked)
              for name, value in r.items() if name.endswith("loss")]  # fmt: skip
    assert [value for step, value in losses if value not in held[step > 5]] == []


@pytest.mark.skipif("trackio" not in INSTALLED, reason="trackio is not installed")
def test_a_tracker_that_cannot_write_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match=r"file/below: trackio does not write \(step 8"):
        train(small(tmp_path / "run", log=("trackio",)))
    train(small(tmp_path / "run", resume=True))


def test_overwriting_a_run_removes_what_trackers_wrote_and_nothing_elsewhere(
    tmp_path: Path,
) -> None:
    train(small(tmp_path / "run"))
    for folder in (tmp_path / "run" / "tensorboard", tmp_path / "kept"):
        folder.mkdir()
        (folder / "events").write_text("of before")
    (tmp_path / "run" / "wandb").symlink_to(tmp_path / "kept")
    train(small(tmp_path / "run", overwrite=True))
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "wandb").is_symlink()
    assert tree(tmp_path / "kept") == {"events": b"of before"}


def test_a_tracker_that_is_not_there_is_named_in_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run")
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        assert main(["train", *words(config), "--log", "tensorboard,wandb"]) == 2
    assert capsys.readouterr().err == (
        "altprop: error: log: wandb needs the package wandb: pip install wandb, or "
        '"altprop[trackers]" for all of them\n'
    )
    assert main(["train", *words(config), "--log", "tensorbord"]) == 2
    assert "unknown tracker 'tensorbord': did you mean tensorboard?" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_quiet_run_says_the_figure_at_its_end_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(small(tmp_path / "run", quiet=True, sample=9))
    captured = capsys.readouterr()
    assert captured.out == (
        f"validation cross-entropy {result.final_loss:.4f} nats per token; run folder "
        f"{tmp_path / 'run'}\n"
    )
    assert captured.err == "" and len(result.sample) == 9
