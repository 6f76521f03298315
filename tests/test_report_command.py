"""`altprop report`: what it writes, what it says in words and numbers, and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from altprop import CheckpointError, ConfigError, DataError
from altprop.lab.cli import main
from altprop.lab.record import read_record
from altprop.lab.report_command import report
from altprop.lab.reporting.comparison import read_comparison
from altprop.lab.reporting.comparison_page import chart_data, verdict
from altprop.lab.reporting.markup import embedded, finite, markup, name, tag
from altprop.lab.reporting.metrics import read_metrics
from altprop.lab.reporting.numbers import duration, interval, large, number
from altprop.lab.reporting.page import static
from altprop.lab.reporting.run_page import chart_data as run_data
from altprop.lab.reporting.thin import average, most_points, thin
from altprop.lab.train import train
from lm_runs import small, tree
from made_comparisons import made, write

# Words and numbers


def test_numbers_are_written_with_the_digits_that_they_carry() -> None:
    assert [number(v) for v in (96.93, 1234567, 0.000123456, -0.5, 0, None, math.nan)] == [
        "96.93", "1,234,567", "1.235e-04", "−0.5", "0", "–", "–",
    ]  # fmt: skip
    assert interval(96.931, (96.58, 97.28), "%") == "96.9 % [96.6, 97.3]"
    assert interval(96.9314, (96.92, 96.94)) == "96.931 [96.920, 96.940]"
    assert interval(100.0, (100.0, 100.0), "%") == "100 % [100, 100]"
    assert interval(0.0, (0.0, 5e-324)) == "0 [0, 4.941e-324]"  # no width that can be halved
    assert interval(0.0, (-1e308, 1e308)).startswith("0 [−100,000,")
    assert interval(-0.5, None, signed=True) == "−0.5"
    assert interval(2.0, (1.0, 3.0), signed=True) == "+2.0 [+1.0, +3.0]"
    assert interval(2.0, (None, None)) == "2" and interval(None, (1.0, 2.0)) == "–"
    assert [large(v, "B") for v in (3_200_000, 812, None)] == ["3.2 MB", "812 B", "–"]
    assert [duration(v) for v in (75.0, 0.0123, 3e-5)] == ["75 s", "12.3 ms", "30 µs"]


def test_what_is_no_markup_is_escaped_and_json_ends_no_script() -> None:
    assert tag("p", "<b>", tag("b", "&"), title='"<') == (
        '<p title="&quot;&lt;">&lt;b&gt;<b>&amp;</b></p>'
    )
    assert markup("a", 1, "<") == "a1&lt;"
    assert name("A(b=1)<") == '<span class="name">A(<wbr>b=<wbr>1)&lt;</span>'
    data = {"</script>": "<!-- & \u2028"}
    assert not set("<>&\u2028") & set(embedded(data))
    assert json.loads(embedded(data)) == data
    assert [finite(v) for v in (math.inf, math.nan, None, 1 / 3)] == [None, None, None, 0.333333]


def test_a_thinned_curve_has_points_of_the_data_and_the_last() -> None:
    curve = {"steps": list(range(1, 1001)), "loss": [1.0 / s for s in range(1, 1001)]}
    thinned = thin(curve, 100)
    assert thinned["steps"] == list(range(10, 1001, 10))
    assert thinned["loss"] == [finite(1.0 / step) for step in thinned["steps"]]
    assert thin(curve, 1000)["steps"] == curve["steps"]
    assert thin({"steps": [], "loss": []}, 5) == {"steps": [], "loss": []}
    assert thin({"steps": [1, 2], "loss": [math.nan, 2.0]}, 5)["loss"] == [None, 2.0]
    assert 200 * most_points(200) <= 60_000 and most_points(1) == 2000


def test_the_mean_curve_is_over_the_steps_that_all_seeds_have() -> None:
    one = {"steps": [1, 2, 3], "loss": [1.0, 2.0, 3.0], "score": [1.0, None, 3.0]}
    other = {"steps": [1, 2], "loss": [3.0, 4.0], "score": [5.0, 6.0]}  # it stopped early
    assert average([one, other]) == {"steps": [1, 2], "loss": [2.0, 3.0], "score": [3.0, None]}
    assert average([]) == {"steps": [], "loss": [], "score": []}


def test_the_first_sentence_says_which_rule_came_how_close() -> None:
    results = made(5)
    best = results["arms"][3]
    best |= {"recovery": {"mean": 0.98, "interval": [0.95, 1.01]},
             "difference": {"mean": -0.2, "interval": [-0.5, 0.1]}}  # fmt: skip
    said = verdict(results, results["arms"])
    assert markup(tag("strong", best["name"]), " recovers the most of backprop") in said
    assert "98 % [95, 101]" in said and "Of 3 rules: 1 not told from, 2 worse than backprop" in said
    best["difference"]["interval"] = [-0.5, -0.1]
    assert "Of 3 rules: 3 worse than backprop" in verdict(results, results["arms"])
    best["difference"]["interval"] = [0.1, 0.5]
    assert "1 better than, 2 worse than backprop" in verdict(results, results["arms"])
    results["task"]["better"] = "lower"
    assert "2 better than, 1 worse than backprop" in verdict(results, results["arms"])
    results["task"]["better"] = "higher"
    best["scores"][0] = None
    said = verdict(results, results["arms"])
    assert "Of 2 rules: 2 worse" in said and "Left out, for seeds that failed: 1." in said
    assert "recovers the most" in said
    frozen = results["arms"][1]["difference"]
    frozen["interval"] = [-3.0, 1.0]  # without a gain of backprop there is nothing to recover
    said = verdict(results, results["arms"])
    assert "recovers the most" not in said and "not shown to beat frozen hidden layers" in said
    frozen["interval"] = [1.0, 3.0]  # frozen layers are better
    assert "not shown to beat frozen" in verdict(results, results["arms"])
    assert verdict(results, []) == "No rule has a score yet."


def test_for_a_loss_the_best_arm_is_the_lowest(tmp_path: Path) -> None:
    results = made(6)
    results["task"] |= {"better": "lower", "unit": "nats"}
    comparison = read_comparison(write(tmp_path / "c", results))
    means = [arm["mean"] for arm in comparison.arms]
    assert means == sorted(means)
    first = chart_data(comparison)["arms"][0]
    assert first["name"] == min(results["arms"], key=lambda arm: arm["mean"])["name"]


def test_steps_without_a_fixed_point_and_refused_ones_are_marked() -> None:
    records: list[dict[str, Any]] = [{"step": s, "loss": 1.0, "refused": s // 2} for s in (1, 2, 3)]
    records.append({"step": 3, "validation_loss": 1.5, "validation_settled": False})
    (panel,) = run_data(records)["panels"]
    assert (panel["refused"], panel["doubts"]) == ([2], {"steps": [3], "values": [1.5]})
    assert run_data([]) == {"domain": [0, 1], "panels": []}


# Files


def test_the_scripts_are_those_that_their_makers_published() -> None:
    listed = re.findall(r"^(\S+\.js) .*?sha256 ([0-9a-f]{64})$", static("LICENSES.txt"), re.M)
    assert [file for file, _ in listed] == ["d3.min.js", "plot.umd.min.js"]
    for file, digest in listed:
        assert hashlib.sha256(static(file).encode()).hexdigest() == digest


def test_the_table_has_every_point_of_every_arm_and_seed(tmp_path: Path) -> None:
    results = made(4, seeds=2)
    results["arms"][0]["curves"][0]["score"][0] = None
    results["arms"][2]["name"] = 'a, "b"'
    report(write(tmp_path / "c", results), csv=tmp_path / "c.csv", png=tmp_path / "c.png")
    rows = list(csv.reader((tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()))
    expected = [
        [arm["name"], str(curve["seed"]), str(step), str(loss), "" if score is None else str(score)]
        for arm in results["arms"]
        for curve in arm["curves"]
        for step, loss, score in zip(curve["steps"], curve["loss"], curve["score"], strict=True)
    ]
    assert rows == [["arm", "seed", "step", "loss", "score"], *expected]
    assert matplotlib.image.imread(tmp_path / "c.png").shape[1] > 800


def test_a_dollar_in_a_name_starts_no_formula_in_the_picture(tmp_path: Path) -> None:
    results = made(3)
    results["arms"][2]["name"] = r"a $\frac{$ b"
    results["task"]["unit"] = "$"
    report(write(tmp_path / "c", results), png=tmp_path / "c.png")
    assert (tmp_path / "c.png").exists()


def test_a_comparison_of_refused_and_unfinished_arms_alone_has_a_page(tmp_path: Path) -> None:
    results = made(4)
    for arm in results["arms"]:
        arm |= dict.fromkeys(
            ("mean", "interval", "difference", "recovery", "cost", "equal_cost", "lr")
        )
        arm |= {"curves": [], "audit": [], "read": [], "rates": [], "scores": [None] * 3}
        arm["refused"] = "needs an <Equilibrium>"
    results["finished"] = False
    text = report(write(tmp_path / "c", results), png=tmp_path / "c.png").read_text()
    assert "Not finished: 0 of 4 arms" in text and "needs an &lt;Equilibrium&gt;" in text


def test_a_run_that_has_no_checkpoint_yet_has_a_page_of_its_metrics(tmp_path: Path) -> None:
    folder = train(small(tmp_path / "run", steps=4)).folder
    for which in ("best", "last"):
        (folder / f"{which}.safetensors").unlink()
    page = report(folder, html=tmp_path / "page.html", csv=tmp_path / "run.csv")
    assert page == tmp_path / "page.html" and not (folder / "report.html").exists()
    assert 'id="training"' in page.read_text() and 'id="signals"' not in page.read_text()
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    records = read_metrics(folder)
    assert [float(row["loss"]) for row in rows] == [r["loss"] for r in records if "loss" in r]
    assert [row["score"] != "" for row in rows] == [False, False, False, True]
    assert {row["arm"] for row in rows} == {"AEP"}


# Refusals


def spoiled(folder: Path, change: str) -> Path:
    """Return the folder of a comparison with something wrong."""
    results = made(3)
    arm = results["arms"][1]
    if change in ODD_ARMS:
        ODD_ARMS[change](arm)
    if change == "task":
        results["task"]["unit"] = ["%"]
    elif change == "format":
        results["format"] = "altprop-comparison/9"
    elif change == "arm":
        del results["arms"][1]["curves"]
    write(folder, results)
    if change == "results":
        (folder / "results.json").unlink()
    elif change == "json":
        (folder / "results.json").write_text("{")
    elif change == "record":
        (folder / "record.json").write_text("[]")
    elif change == "neither":
        (folder / "comparison.yaml").unlink()
    return folder


ODD_ARMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mean": lambda arm: arm.update(mean="97"),
    "not finite": lambda arm: arm["scores"].append(math.inf),
    "interval": lambda arm: arm["difference"].update(interval=[2.0, 1.0]),
    "ends": lambda arm: arm.update(interval=[1.0]),
    "cost": lambda arm: arm.update(cost=7),
    "columns": lambda arm: arm["curves"][0]["loss"].pop(),
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("task", r"task.unit is a list, expected a text: compare again"),
        ("mean", r"arms\[1\].mean is '97', expected a number or null: compare again"),
        ("not finite", r"arms\[1\].scores\[3\] is inf, expected a number or null: compare again"),
        ("interval", r"arms\[1\] has an interval from 2 to 1: compare again"),
        ("ends", r"arms\[1\].interval has 1 values, expected 2: compare again"),
        ("cost", r"arms\[1\].cost is 7, expected a mapping or null: compare again"),
        ("columns", r"arms\[1\].curves\[0\] has columns of several lengths: compare again"),
        ("neither", "neither a run nor a comparison; give the folder of altprop train"),
        ("results", "no results.json there yet; go on with the comparison"),
        ("json", "results.json: not JSON"),
        ("format", "its format is 'altprop-comparison/9', expected 'altprop-comparison/1'"),
        ("arm", r"arms\[1\] has no curves: compare again"),
        ("record", "record.json: no record of a run or comparison"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_a_line(
    change: str, told: str, tmp_path: Path
) -> None:
    folder = spoiled(tmp_path / "c", change)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=told):
        report(folder, png=tmp_path / "c.png")
    assert tree(tmp_path) == before


RECORDS: list[tuple[str, dict[str, Any], str]] = [
    ("metrics.jsonl", {"step": "1"}, "line 1.step is '1', expected a whole number"),
    ("metrics.jsonl", {"step": 1, "loss": "x"}, "line 1.loss is 'x', expected a number or true or"),
    ("metrics.jsonl", {"step": 1, "loss": [1]}, "line 1.loss is a list"),
    ("metrics.jsonl", {"step": 1, "loss": math.nan}, "line 1.loss is nan"),
    ("metrics.jsonl", {"loss": 1.0}, "line 1 has no step"),
    ("run.json", {"sessions": []}, "it has no session"),
    ("run.json", {"sessions": [{"command": 1}]}, "the last session has no"),
    ("record.json", {"command": "a", "versions": 7}, "versions is 7, expected a mapping or null"),
]


@pytest.mark.parametrize(("name", "said", "told"), RECORDS, ids=[told for *_, told in RECORDS])
def test_a_record_of_other_values_than_were_measured_is_refused_in_a_line(
    name: str, said: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(json.dumps(said) + "\n")
    with pytest.raises(CheckpointError, match=told) as caught:
        (read_metrics if name == "metrics.jsonl" else read_record)(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", made(3))
    before = tree(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        report(folder, csv=tmp_path / "nowhere" / "c.csv")
    with pytest.raises(ConfigError, match="png and csv are both .*: give each a file of its own"):
        report(folder, png=tmp_path / "x", csv=tmp_path / "x")
    assert tree(tmp_path) == before


def test_the_command_writes_the_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "c", made(3))
    assert main(["report", str(folder), "--csv", str(tmp_path / "c.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"wrote {folder / 'report.html'}", f"wrote {tmp_path / 'c.csv'}"]
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "neither a run nor a comparison" in capsys.readouterr().err


def test_a_file_does_not_say_where_a_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "c", made(3))
    for option in ("html", "png", "csv"):
        (tmp_path / "mine.yaml").write_text(f"{option}: elsewhere\n")
        before = tree(tmp_path)
        assert main(["report", str(folder), "--config", str(tmp_path / "mine.yaml")]) == 2
        assert f"{option} is not read from a file: write --{option}" in capsys.readouterr().err
        assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "file", ["results.json", "record.json", "run/metrics.jsonl", "run/run.json"]
)
def test_a_fifo_in_the_place_of_a_file_is_a_line_and_no_hang(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "c", made(3))
    if file.startswith("run/"):
        folder = train(small(tmp_path / "run", steps=1)).folder
    place = folder / Path(file).name
    place.unlink()
    os.mkfifo(place)
    assert main(["report", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(place) in line and "a fifo, expected a regular file" in line
    assert not (folder / "report.html").exists()
