"""Trackers: callbacks that hand a run's figures to trackio, TensorBoard or Weights & Biases.

What they write lies in the run's folder, and nothing of it leaves the machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from altprop import ConfigError
from altprop.lab.callbacks import Begin, Callback, End

PROJECT = "altprop"


def trackers(names: Sequence[str]) -> list[Callback]:
    """Return the trackers of these names.

    **Raises:** `ConfigError` for one whose package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f'log: {name} needs the package {name}: pip install {name}, or "altprop[trackers]"'
                " for all of them"
            )
    return [_TRACKERS[name]() for name in dict.fromkeys(names)]


class _Tracker(Callback):
    """Hands over the numbers of each record, by the name that they have in `metrics.jsonl`."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Hand over what was measured at a step."""
        raise NotImplementedError

    def on_step(self, record: Mapping[str, Any]) -> None:
        figures = {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}
        self.write(record["step"], {k: v for k, v in figures.items() if k != "step"})

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        self.on_step(record)

    def on_end(self, end: End) -> None:
        if end.record:
            self.on_step(end.record)


class TensorBoard(_Tracker):
    """Writes an event file below `tensorboard` in the run's folder.

    `tensorboard --logdir runs` shows all runs below a folder. Of a resumed run, what was written of
    steps after the checkpoint is not shown any more.
    """

    def on_begin(self, begin: Begin) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = begin.step + 1 if begin.step else None
        self._writer = SummaryWriter(str(begin.folder / "tensorboard"), purge_step=purge)
        lines = (f"    {name}: {value}" for name, value in begin.options.items())
        self._writer.add_text("config", "\n".join(lines), begin.step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        super().on_evaluation(record)
        self._writer.flush()

    def on_end(self, end: End) -> None:
        super().on_end(end)
        self._writer.close()


class Trackio(_Tracker):
    """Writes trackio's database below `trackio` in the run's folder.

    `TRACKIO_DIR=RUN/trackio trackio show` shows it, on this machine alone (127.0.0.1). Where the
    environment has a `TRACKIO_DIR` already, that folder collects the runs. A process of its own
    writes: trackio takes its folder from the environment once, and a program may make many runs.
    """

    def on_begin(self, begin: Begin) -> None:
        kept = os.environ.get("TRACKIO_DIR") or str((begin.folder / "trackio").absolute())
        # no space, server, bucket or webhook of the environment gets any of it, and no hub is asked
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRACKIO_")}
        self._folder, self._errors = kept, tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("trackio_writer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**inherited, "TRACKIO_DIR": kept, "HF_HUB_OFFLINE": "1", "SYSTEM": ""},
            text=True,
            start_new_session=True,  # Ctrl-C asks the run alone, which then ends this one
        )
        self._send(
            {
                "project": PROJECT,
                "name": begin.folder.absolute().name,
                "config": begin.options,
                "resume": "allow" if begin.step else "never",
            }
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._send({"step": step, **figures})

    def on_end(self, end: End) -> None:
        super().on_end(end)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # its status says why
        if self._process.wait():
            raise self._error()
        self._errors.close()

    def _send(self, values: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(values, default=_plain) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            raise self._error() from None

    def _error(self) -> ConfigError:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        why = said[-1] if said else f"status {self._process.returncode}"
        return ConfigError(
            f"{self._folder}: trackio does not write ({why}): go on with --resume and another --log"
        )


class WandB(_Tracker):
    """Writes an offline run below `wandb` in the run's folder; `wandb sync` may send it later.

    A resumed run writes a second folder there, of a run with the same id.
    """

    def on_begin(self, begin: Begin) -> None:
        import wandb

        before = sorted((begin.folder / "wandb").glob("offline-run-*-*")) if begin.step else []
        self._run = wandb.init(
            project=PROJECT,
            name=begin.folder.absolute().name,
            id=before[-1].name.rpartition("-")[2] if before else None,
            dir=str(begin.folder),
            config=json.loads(json.dumps(begin.options, default=_plain)),
            mode="offline",
            reinit="create_new",  # beside one that the program may have of its own
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True,
                save_code=False, x_disable_stats=True, x_disable_meta=True,
            ),
        )  # fmt: skip

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def on_end(self, end: End) -> None:
        super().on_end(end)
        self._run.finish(exit_code=1 if end.error else 0)


_TRACKERS: dict[str, Callable[[], Callback]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def _plain(value: Any) -> Any:
    """Return a frozen mapping as JSON takes it."""
    return dict(value)
