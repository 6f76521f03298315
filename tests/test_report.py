"""What a person sees of a run: the curves, and the display while it goes on."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from altprop import CheckpointError
from altprop.lab.display import Display
from altprop.lab.evaluation import Evaluation
from altprop.lab.reporting.metrics import read_metrics, refused_steps
from altprop.lab.reporting.picture import plot_run
from altprop.lab.state import Progress
from altprop.lab.train import train
from lm_runs import small


def record(step: int, **changes: Any) -> dict[str, Any]:
    """Return what a run logs of a step."""
    return {
        "step": step,
        "loss": 3.0 / step,
        "free_residual": 2e-4,
        "adjoint_residual": 4e-4,
        "free_evaluations": 7.0,
        "adjoint_evaluations": 9.0,
        "refused": 0,
        "tokens_per_second": 12345.0,
        **changes,
    }


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


def has_colour(picture: Any, rgb: tuple[int, int, int]) -> bool:
    """Tell whether a colour covers some pixels of a picture."""
    return bool((np.abs(picture[..., :3] * 255 - rgb).max(-1) < 45).sum() >= 10)


RED = (214, 39, 40)
ORANGE = (255, 127, 14)
BLUE = (31, 119, 180)


# Curves


def test_a_run_ends_with_a_picture_of_its_curves(tmp_path: Path) -> None:
    folder = train(small(tmp_path / "run")).folder
    picture = matplotlib.image.imread(folder / "curves.png")
    assert picture.shape[0] > 600 and picture.shape[1] > 800
    assert has_colour(picture, BLUE) and has_colour(picture, ORANGE)
    assert not has_colour(picture, RED)
    assert [path.name for path in folder.iterdir() if "part" in path.name] == []


def test_refused_steps_are_marked_where_their_count_goes_up(tmp_path: Path) -> None:
    records = [record(step, refused=max(0, step - 6)) for step in range(1, 10)]
    assert refused_steps(records) == [7, 8, 9]
    assert refused_steps(records[7:]) == [8, 9]  # the first shown counts what it refused itself
    assert refused_steps([]) == []
    assert has_colour(matplotlib.image.imread(plot_run(write(tmp_path, records))), RED)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(1)],
        [record(1), {"step": 1, "validation_loss": 3.0, "validation_free_residual": 0.0}],
        [record(s, loss=None, free_residual=None, adjoint_residual=None) for s in (1, 2)],
        [record(s, free_residual=0.0) for s in (1, 2)],
        [{"step": s, "loss": 3.0, "refused": 0, "tokens_per_second": 1.0} for s in (1, 2)],
    ],
    ids=["nothing", "one step", "one evaluation", "all lost", "no residual", "no equilibrium"],
)
def test_any_run_can_be_drawn(records: list[dict[str, Any]], tmp_path: Path) -> None:
    picture = matplotlib.image.imread(plot_run(write(tmp_path, records)))
    assert float(picture.std()) > 0.01


def test_an_evaluation_at_no_fixed_point_is_marked_in_the_picture(tmp_path: Path) -> None:
    records = [record(1), {"step": 1, "validation_loss": 3.0, "validation_settled": True}]
    assert not has_colour(matplotlib.image.imread(plot_run(write(tmp_path, records))), RED)
    records.append({"step": 2, "validation_loss": 2.0, "validation_settled": False})
    assert has_colour(matplotlib.image.imread(plot_run(write(tmp_path, records))), RED)


def test_metrics_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no metrics.jsonl there"):
        read_metrics(tmp_path)
    write(tmp_path, [record(1)])
    assert read_metrics(tmp_path) == [record(1)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("step 2\n")
    with pytest.raises(CheckpointError, match="not one JSON object a line"):
        plot_run(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(CheckpointError, match="not one JSON object a line"):
        read_metrics(tmp_path)


# Display


def shown(
    terminal: bool,
    width: int = 80,
    refused: int = 0,
    settled: bool = True,
    windows: tuple[int, int] = (1742, 1742),
) -> str:
    """Return what a run of 40 steps shows."""
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=terminal, width=width, color_system=None, legacy_windows=False
    )
    with Display(40, console=console, every=0.0) as display:
        display.step(record(10, refused=refused))
        display.evaluation(10, Evaluation(2.4, 1e-4, settled))
        display.step(record(11, refused=refused))
    progress = Progress(40, refused, loss=2.4, best_loss=2.3 if settled else math.inf)
    display.sample("a sample\nof text")
    display.finish(progress, Evaluation(2.5, 0.3, settled), windows, Path("runs/x"))
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "plain stream"])
def test_the_display_shows_how_the_run_stands(terminal: bool) -> None:
    text = shown(terminal, refused=3)
    for part in (
        "step 11/40",
        "loss 0.273",
        "validation 2.400",
        "12.3k tok/s",
        "residual 2e-04",
        "16 evals",
        "3 refused",
        " left",
        "step 10/40  validation loss 2.4000",
        "a sample\nof text\n",
        "validation cross-entropy 2.4000 nats per token (best 2.3000)",
        "over the whole validation part, 1,742 windows: 2.5000\n",
        "refused steps 3 of 40",
        "run folder runs/x",
    ):
        assert part in text, part
    assert "refused" not in shown(terminal).split("validation cross-entropy")[0]


def test_the_display_says_which_figures_are_of_no_fixed_point_and_how_much_is_covered() -> None:
    text = shown(False, width=200, settled=False, windows=(2048, 7342))
    doubt = "  NOT AT A FIXED POINT: free residual "
    assert f"validation loss 2.4000{doubt}1.0e-04 past free_limit\n" in text
    assert "(no best: no evaluation was finite and at a fixed point)" in text
    assert "over 2,048 of the validation part's 7,342 windows: 2.5000" + doubt + "3.0e-01" in text
    assert "NOT AT" not in shown(False)


def test_on_a_plain_stream_there_are_plain_lines_and_on_a_terminal_live_ones() -> None:
    assert "\x1b" not in shown(terminal=False) and "━" not in shown(terminal=False)
    assert "\x1b[?25l" in shown(terminal=True)  # the cursor is hidden ...
    assert "\x1b[?25h" in shown(terminal=True)  # ... and comes back


def test_the_live_lines_fit_into_80_columns() -> None:
    for line in shown(terminal=True, refused=3).splitlines():
        assert "…" not in line
    assert any(
        line.rstrip().endswith("16 evals  3 refused")
        for line in shown(terminal=True, refused=3).splitlines()
    )


def test_a_plain_line_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 200.0, 200.0, 200.0])
    monkeypatch.setattr("altprop.lab.display.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    display = Display(100, done=50, console=Console(file=stream, width=200))
    display.step(record(60))  # 10 steps in 100 s, so 400 s for the other 40
    assert stream.getvalue().rstrip().endswith("6:40 left")


def test_plain_lines_come_only_every_so_many_seconds() -> None:
    stream = io.StringIO()
    with Display(40, console=Console(file=stream), every=3600.0) as display:
        for step in range(1, 41):
            display.step(record(step))
        display.evaluation(40, Evaluation(2.0, 0.0, True))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "step 1/40",
        "step 40/40",
    ]


def test_text_is_shown_as_it_is() -> None:
    stream = io.StringIO()
    text = "[bold]ROMEO[/bold] :smile: [/x] \\[ 3.14 'q' " + "long " * 40
    display = Display(1, console=Console(file=stream, width=40))
    display.note(text)
    assert stream.getvalue() == text + "\n"


def test_a_model_without_an_equilibrium_is_shown_without_residual() -> None:
    stream = io.StringIO()
    display = Display(2, console=Console(file=stream, width=200))
    display.step({"step": 1, "loss": math.nan, "refused": 1, "tokens_per_second": 10.0})
    assert stream.getvalue().startswith("step 1/2  loss nan  0.0k tok/s  1 refused")
