"""The tables of an audit say what its rows hold, cut and not rounded; a file is whole or none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import altprop as ap
from altprop.auditing.agreement import Agreement, Flag
from altprop.auditing.rows import Cost, Measured, Outcome, Reference, Row, Words
from altprop.auditing.tables import cut

WHOLE = (
    Agreement(0.75, 1.2, 0.11, 0.61, True),
    Agreement(0.65, 1.4, 0.33, 0.83, False),
)
ODD = {"p3": (0.1, 0.9), "p6": (0.4, 0.4)}  # the worst at a trial, and the worst on average
RATIOS = {"p2": (0.1, 3.0)}


def report(count: int, name: str = "mine") -> ap.AuditReport:
    """Return an audit of two trials of so many parameters, whose figures are stated above."""
    outcomes = []
    for trial in (0, 1):
        named = {}
        for p in (f"p{i}" for i in range(count)):
            cosine = ODD.get(p, (0.99999999, 0.89))[trial]
            named[p] = Agreement(cosine, RATIOS.get(p, (1.0, 1.0))[trial], 0.5, 1.0, True)
        if trial:
            named["p1"] = Agreement(flag=Flag.REFERENCE_FLOOR)
        measured = Measured(10 + trial, 1.5e-4, 2.5e-3, None, 3.5e-2, failures=("it failed",))
        outcomes.append(Outcome(named, WHOLE[trial], measured))
    row = Row(Words(name, "rule", None), outcomes, Cost(12.345, 3 * 2**19))
    own = Measured(7, 4.5e-4)
    reference = Reference(Words("exact", "rule", None), {}, [own], Cost(None, 2**20))
    return ap.AuditReport(reference, [row], ["one", "two"])


def lines(text: str, title: str) -> list[str]:
    """Return the lines of the table of this title, up to the next one."""
    found = [line.rstrip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(found) if line.startswith(title))
    titles = ("Cosine to", "Norm ratio", "Cost; worst")
    ends = [i for i, line in enumerate(found) if line.startswith(titles) and i > start]
    return found[start : min(ends, default=len(found))]


def row_of(table: list[str], arm: str) -> list[str]:
    return next(line for line in table if line.split()[:1] == [arm]).split()


def test_figures_are_cut_so_that_only_a_cosine_of_one_reads_as_one() -> None:
    assert cut(0.999999, 5) == "0.99999" and cut(1.0, 5) == "1.00000"
    assert cut(-0.999999, 5) == "-0.99999" and cut(0.123456, 4) == "0.1234"
    assert cut(None, 4) == cut(float("nan"), 4) == cut(float("inf"), 4) == "–"


def test_few_parameters_have_a_column_each() -> None:
    few = report(4)
    text = str(few)
    table = lines(text, "Cosine to exact (2 trials)")
    mean = few.rows[0].mean("cosine")
    assert row_of(table, "mine") == [
        "mine",
        "0.94499",  # of 0.99999999 and 0.89
        "0.99999†",  # one trial is left out, and it is marked
        "0.94499",
        "0.50000",
        cut(mean.mean, 5),
        "±",
        f"{mean.half_width:.4f}",
        "0.10000",
    ]
    sizes = row_of(lines(text, "Norm ratio"), "mine")
    assert sizes == ["mine", "1.0000", "1.0000†", "1.5500", "1.0000", "0.22", "0.7200", "50%"]
    assert "† mine, p1: the reference is near the floating-point floor in 1 of 2" in text
    assert "! mine: it failed" in text


def test_many_parameters_have_a_digest_which_names_the_worst() -> None:
    many = report(8)
    text = str(many)
    table = row_of(lines(text, "Cosine to exact"), "mine")
    mean = many.rows[0].mean("cosine")
    assert table[1:3] == ["8", "p3"] and table[-1] == "0.10000"
    assert table[3:6] == [cut(mean.mean, 5), "±", f"{mean.half_width:.4f}"]
    ratio = many.rows[0].mean("norm_ratio").mean
    sizes = row_of(lines(text, "Norm ratio"), "mine")
    assert sizes[1:3] == [cut(ratio, 4), "0.1000"]
    assert "p7" not in text  # a parameter without anything to tell of it has no column


def test_costs_are_those_of_every_arm_and_of_the_reference() -> None:
    table = lines(str(report(4)), "Cost; worst residuals")
    assert row_of(table, "mine")[1:] == ["10.5", "12.3", "1.50", "1.5e-04", "2.5e-03", "3.5e-02"]
    assert row_of(table, "exact")[1:] == ["7.0", "–", "1.00", "4.5e-04", "–", "–"]


def test_six_parameters_are_few_and_seven_are_many() -> None:
    assert "worst at" not in str(report(6)) and "worst at" in str(report(7))


@pytest.mark.parametrize("count", [4, 13])
def test_tables_fit_a_terminal_of_100_columns_whole_and_are_drawn(
    count: int, tmp_path: Path
) -> None:
    made = report(count, "a rule under a name that is far too long for any column of a table")
    text = str(made)
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert made.plot(tmp_path / "audit.png").stat().st_size > 5000


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ap.ConfigError, match=r'pip install "altprop\[plots\]"'):
        report(2).plot(tmp_path / "audit.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["missing/audit.json", ".", "file/audit.json"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ap.DataError, match="give the path of a file|there is no folder"):
        ap.AuditReport.check_target(tmp_path / target)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.json"
    assert report(2).write_json(path) == path
    before = path.read_text()
    assert before == report(2).to_json() + "\n" and list(tmp_path.iterdir()) == [path]

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ap.DataError, match="No space left on device"):
        report(3).write_json(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_times_are_medians_in_milliseconds_of_every_arm_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took = iter([0.001, 0.1, 0.003, 0.2, 0.5, 0.9])  # the reference's and the arm's, in turn
    now, running = 0.0, False

    def clock() -> float:
        nonlocal now, running
        if running:
            now += next(took)
        running = not running
        return now

    monkeypatch.setattr("time.perf_counter", clock)
    x, y = torch.randn(2, 3, 4)
    report = ap.audit(
        torch.nn.Linear(4, 4),
        (x, y),
        torch.nn.functional.mse_loss,
        [ap.FeedbackAlignment()],
        ap.Backprop(),
        repeats=3,
    )
    assert report.reference.cost.milliseconds == pytest.approx(3.0)
    assert report.rows[0].cost.milliseconds == pytest.approx(200.0)
