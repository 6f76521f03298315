"""A published figure: what is measured is kept, added to, and shown beside what was published."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import altprop as ap
from altprop.lab import reproduce as figures
from altprop.lab.cli import main
from altprop.lab.compare.arms import Arm
from altprop.lab.reproduce import command
from altprop.lab.reproduce.figure import Figure, Measured, measured
from altprop.lab.reproduce.learning import score_of
from altprop.lab.reproduce.residual_penalty import RULE, ResidualMLP, held
from altprop.lab.reproduce.table import lines, page
from altprop.lab.tasks.supervised import Supervised
from altprop.lab.tasks.task import plain_adamw

VALUES = {0: 0.5, 1: 0.7, 2: 0.75, 3: 0.2}


class Broken(Exception):
    """What an experiment stops by."""


@pytest.fixture
def asked() -> list[int]:
    return []


@pytest.fixture
def figure(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> Figure:
    def measure(seed: int) -> dict[str, float]:
        asked.append(seed)
        if seed == 3:
            raise Broken
        return {"theirs": VALUES[seed], "ours alone": 1.0}

    made = Figure(
        title="A title",
        source="A paper",
        setting="A small setting",
        unit="cosine",
        published={"theirs": 0.6, "ours alone": None},
        measure=measure,
        differs="Their seed is not known.",
    )
    monkeypatch.setitem(figures.FIGURES, "some-figure", "what a test shows")
    real = command.importlib.import_module

    def found(name: str) -> object:
        own = name == "altprop.lab.reproduce.some_figure"
        return SimpleNamespace(FIGURE=made) if own else real(name)

    monkeypatch.setattr(command.importlib, "import_module", found)
    return made


def test_every_figure_of_the_list_is_one_that_says_everything() -> None:
    for name in figures.FIGURES:
        figure = command.load(name)
        assert figure.seeds > 1 and figure.published
        for text in (figure.title, figure.source, figure.setting, figure.unit, figure.differs):
            assert text.strip() == text != ""


def test_what_was_measured_is_not_measured_twice(
    figure: Figure, asked: list[int], tmp_path: Path
) -> None:
    first = command.reproduce("some-figure", seeds=1, out=tmp_path)["some-figure"]
    assert asked == [0] and first.seeds == [0]
    more = command.reproduce("some-figure", out=tmp_path)["some-figure"]
    assert asked == [0, 1, 2] and more.values["theirs"] == [0.5, 0.7, 0.75]
    assert command.reproduce("some-figure", out=tmp_path)["some-figure"] == more
    assert asked == [0, 1, 2]


def test_an_experiment_that_stops_keeps_the_seeds_before(figure: Figure, tmp_path: Path) -> None:
    path = tmp_path / "some-figure.json"
    with pytest.raises(Broken):
        list(measured(figure, 4, path))
    kept = Measured.read(path)
    assert kept.seeds == [0, 1, 2] and kept.values["theirs"] == [0.5, 0.7, 0.75]
    assert kept.seconds > 0 and kept.versions["altprop"] == ap.__version__
    assert [entry.name for entry in tmp_path.iterdir()] == ["some-figure.json"]


def test_lines_stand_beside_the_published_ones_with_students_interval(figure: Figure) -> None:
    values = [VALUES[seed] for seed in range(3)]
    found = Measured({"theirs": values, "ours alone": [1.0, 1.0, 1.0]}, [0, 1, 2])
    low, high = stats.t.interval(0.95, 2, statistics.fmean(values), stats.sem(values))
    half = (high - low) / 2
    assert lines(figure, found) == [
        ("theirs", "0.6", f"0.650 ± {half:.3f}"),
        ("ours alone", "–", "1.000 ± 0.000"),
    ]
    assert lines(figure, Measured()) == [("theirs", "0.6", "–"), ("ours alone", "–", "–")]
    assert f"| theirs | 0.6 | 0.650 ± {half:.3f} |" in page("some-figure", figure, found)


def test_a_measurement_of_other_lines_is_a_fault(figure: Figure, tmp_path: Path) -> None:
    wrong = Figure(**{**vars(figure), "measure": lambda seed: {"theirs": 1.0}})
    with pytest.raises(ValueError, match="ours alone"):
        list(measured(wrong, 1, tmp_path / "some-figure.json"))


@pytest.mark.parametrize("record", ["[1]", "{", '{"other": 1}', '{"values": {"old line": [1]}}'])
def test_a_foreign_record_is_refused_in_one_line_and_stays(
    record: str, figure: Figure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some-figure.json"
    path.write_text(record)
    assert main(["reproduce", "some-figure", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "--out" in line
    assert path.read_text() == record


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["some-figur"], "some-figure"),
        (["--seeds", "2"], "reproduce NAME"),
        (["some-figure", "--seeds", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: list[str], said: str, figure: Figure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", *words, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not out.exists()


def test_the_list_says_what_was_measured(
    figure: Figure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.reproduce("some-figure", out=tmp_path)
    capsys.readouterr()
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "some-figure" in out and "3 seeds" in out and "not yet" in out


RESULTS = Path(__file__).parents[1] / "benchmarks/results/reproduce"


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_the_page_shows_what_was_measured(name: str) -> None:
    text = (Path(__file__).parents[1] / "docs/reproductions.md").read_text(encoding="utf-8")
    record = Measured(**json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
    assert page(name, command.load(name), record) in text


@pytest.mark.parametrize("rule", [None, RULE], ids=["backprop", "direct feedback"])
def test_a_block_feels_the_penalty_on_its_own_output_alone_and_exactly(rule: Any) -> None:
    class Task:
        def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
            return 0 * model(batch[0]).sum()

    torch.manual_seed(0)
    model, x = ResidualMLP(5, 4, 2, 3).double(), torch.randn(6, 5, dtype=torch.float64)
    wanted, h = [], model.embed(x)
    for block in model.blocks:
        size = block(h.detach()).square().mean()
        wanted += torch.autograd.grad(size / 2, list(block.parameters()))
        h = block(h)
    if rule is not None:
        ap.convert(model, rule, output="head", batch_axis=0)
    held(Task(), 0.5, rule is not None)(model, (x,)).backward()  # type: ignore[arg-type]
    for p, gradient in zip(model.blocks.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-15)
    assert not any(p.grad.any() for p in model.embed.parameters())


def test_a_run_that_is_lost_is_no_figure() -> None:
    broken = Supervised(
        name="broken",
        make=lambda: nn.Linear(2, 2),
        train=(torch.full((40, 2), torch.inf), torch.zeros(40, dtype=torch.long)),
        test=(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)),
        recipe=plain_adamw(steps=30, batch=4, lr=1e-3),
    )
    with pytest.raises(ap.ConvergenceError, match=r"backprop on broken, seed 3: 20 of 20 steps"):
        score_of(Arm("backprop"), broken, seed=3)
