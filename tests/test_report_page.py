"""The page of a comparison or a run, as a browser draws it: what is drawn is what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from altprop.lab.report_command import report
from altprop.lab.reporting.metrics import read_metrics, series
from altprop.lab.train import train
from chromium import PROGRAM, Browser
from lm_runs import small
from made_comparisons import made, write

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Debian's package chromium")

# the points of a line of a chart, in the units of its axes
POINTS = """
((chart, line) => {
  const plot = document.querySelector(chart).plot;
  const svg = plot.scale ? plot : plot.querySelector("svg");
  const [x, y] = [svg.scale("x"), svg.scale("y")];
  return [...svg.querySelectorAll(line + " path")].map((path) =>
    [...path.getAttribute("d").matchAll(/([-\\d.]+),([-\\d.]+)/g)]
      .map(([, px, py]) => [x.invert(+px), y.invert(+py)]));
})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def points(browser: Browser, chart: str, line: str) -> list[np.ndarray]:
    return [np.array(found) for found in browser.run(f"{POINTS}({chart!r}, {line!r})")]


def texts(browser: Browser, place: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({place!r})].map((e) => e.textContent)")


def best_first(results: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(results["arms"], key=lambda arm: -arm["mean"])


@pytest.mark.parametrize("arms", [1, 40])
def test_the_drawn_curves_and_bars_are_the_data_for_one_arm_and_for_forty(
    arms: int, browser: Browser, tmp_path: Path
) -> None:
    results = made(arms, seeds=5)
    page = report(write(tmp_path / "comparison", results))
    assert page.stat().st_size < 2e6
    browser.open(page)
    assert (browser.errors, browser.requests) == ([], [page.as_uri()])
    ordered = best_first(results)
    for index, arm in enumerate(ordered):
        (mean,) = points(browser, "#curves figure", f".mean-{index}")
        scores = np.mean([curve["score"] for curve in arm["curves"]], axis=0)
        assert np.abs(mean[:, 0] - arm["curves"][0]["steps"]).max() < 0.5
        assert np.abs(mean[:, 1] - scores).max() < 0.1
    bars = browser.run(
        """(() => { const plot = document.querySelector("#closeness figure").plot;
        const x = plot.scale("x"); return [...plot.querySelectorAll(".means rect")].map((bar) =>
          [+bar.getAttribute("x"), +bar.getAttribute("width")].map((v, i, [x0, w]) =>
            x.invert(i ? x0 + w : x0))); })()"""
    )
    shares = [arm["recovery"]["mean"] for arm in ordered if not arm["control"]]
    assert len(bars) == len(shares)
    for (left, right), share in zip(bars, shares, strict=True):
        assert left == pytest.approx(min(0, 100 * share), abs=0.2)
        assert right == pytest.approx(max(0, 100 * share), abs=0.2)
    cells = browser.run("document.querySelectorAll('.cells rect').length")
    audited = [arm for arm in ordered if arm["audit"]]
    assert cells == sum(len(a["groups"]) for arm in audited for a in arm["audit"])


def test_every_seed_is_drawn_and_a_switch_changes_what_is_drawn(
    browser: Browser, tmp_path: Path
) -> None:
    results = made(4, seeds=3)
    browser.open(report(write(tmp_path / "c", results)))
    by_curve = [c for arm in best_first(results)[::-1] for c in arm["curves"]]
    drawn = points(browser, "#curves figure", ".seed")
    assert len(drawn) == len(by_curve)
    ends = sorted(curve["score"][-1] for curve in by_curve)
    assert sorted(line[-1, 1] for line in drawn) == pytest.approx(ends, abs=0.1)
    press = "[...document.querySelectorAll('#curves button')].find((b) => b.textContent === %r)"
    browser.run(press % "loss" + ".click()")
    browser.run(press % "cost" + ".click()")
    (line,) = points(browser, "#curves figure", ".mean-1")
    arm = best_first(results)[1]
    losses = np.mean([curve["loss"] for curve in arm["curves"]], axis=0)
    assert line[-1] == pytest.approx((300 * arm["cost"]["relative"], losses[-1]), abs=0.5, rel=1e-2)
    browser.run(f"{press % arm['name']}.click()")  # its seeds go with its colour
    assert len(points(browser, "#curves figure", ".seed")) == len(by_curve) - 3
    assert browser.errors == []


def test_the_heat_map_has_the_colour_of_the_cosine(browser: Browser, tmp_path: Path) -> None:
    results = made(3)
    group = {"ratio": 1.0, "cosine": 1.0}
    results["arms"][2]["audit"] = [
        {"step": 0, "groups": [{**group, "name": "a"}, {**group, "name": "b", "cosine": -0.9},
                               {**group, "name": "c", "cosine": None}]}
    ]  # fmt: skip
    browser.open(report(write(tmp_path / "c", results)))
    index = [arm["name"] for arm in best_first(results)].index(results["arms"][2]["name"])
    fill = f"[...document.querySelectorAll('#audit-{index} .cells rect')]"
    assert browser.run(f"{fill}.map((cell) => cell.getAttribute('fill'))") == [
        "var(--p6)",
        "var(--n2)",
    ]
    assert {"1.00", "−0.90", "–"} <= set(texts(browser, f"#audit-{index} text"))


HOSTILE = (
    "</script><script>window.hacked=1</script><!--<img src=x onerror='window.hacked=1'>"
    "\u2028\u2029&lt;\ud800\x00\"'$x$"
)


def test_no_text_of_a_comparison_is_ever_markup(browser: Browser, tmp_path: Path) -> None:
    results = made(5)
    results["task"] |= {"name": HOSTILE, "data": HOSTILE, "score": HOSTILE, "unit": HOSTILE}
    for arm in results["arms"][2:]:
        arm["name"] += HOSTILE
        arm["failed"] = HOSTILE
        arm["read"][0] = {"parameter": HOSTILE, "how": HOSTILE}
        arm["audit"][0]["groups"][0]["name"] = HOSTILE
    folder = write(tmp_path / "c", results)
    (folder / "comparison.yaml").write_text("# " + HOSTILE.replace("\ud800", ""))
    page = report(folder)
    browser.open(page)
    assert (browser.errors, browser.requests) == ([], [page.as_uri()])
    assert browser.run("window.hacked === undefined && document.images.length === 0")
    assert browser.run("document.scripts.length") == 5
    assert any("<img src=x" in text for text in texts(browser, "h1"))
    assert any("<img src=x" in text for text in texts(browser, "#read td"))


def test_a_page_runs_no_script_but_its_own(browser: Browser, tmp_path: Path) -> None:
    """The policy is the second lock: what slips through the escaping does not run either."""
    page = report(write(tmp_path / "c", made(3)))
    text = page.read_text(encoding="utf-8")
    slipped = "<script>window.hacked=1</script><img src='http://127.0.0.1:9/x.png'>"
    page.write_text(text.replace("<h1>", slipped + "<h1>"), encoding="utf-8")
    browser.open(page)
    assert browser.run("window.hacked === undefined")
    assert len(browser.errors) == 2 and all("Content Security" in e for e in browser.errors)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_a_page_fits_a_phone_and_follows_the_colour_scheme(
    browser: Browser, tmp_path: Path
) -> None:
    page = report(write(tmp_path / "c", made(6)))
    seen = []
    for dark in (False, True):
        browser.open(page, width=390, height=844, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") == 390
        seen.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert seen == ["rgb(252, 252, 253)", "rgb(18, 21, 27)"]


def test_the_page_of_a_run_draws_its_metrics_and_shows_what_its_model_does(
    browser: Browser, tmp_path: Path
) -> None:
    from altprop import DirectFeedback

    config = small(tmp_path / "run", model="gpt", layers=1, rule=DirectFeedback())
    train(config)
    page = report(tmp_path / "run", sample=20)
    browser.open(page)
    assert (browser.errors, browser.requests) == ([], [page.as_uri()])
    records = read_metrics(tmp_path / "run")
    for index, name in enumerate(("loss", "validation_loss")):
        (line,) = points(browser, "#panel-0", f".line-{index}")
        for column, values in zip(line.T, series(records, name), strict=True):
            assert np.abs(column - np.array(values)).max() < 0.02
    cells = texts(browser, "#signals td")
    assert {"DirectFeedback", "broadcast error", "head.weight"} <= set(cells)
    assert len(texts(browser, "#sample pre")[0]) == 20
    (command, *_) = texts(browser, "#again code")
    (session,) = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["sessions"]
    assert command == session["command"]
