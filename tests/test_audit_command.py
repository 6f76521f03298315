"""`altprop audit` audits the reference problem, and says whether its reference can be trusted."""

from __future__ import annotations

import io
import json
import random
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from altprop import AuditReport, ConfigError, DataError
from altprop.lab.audit_command import audit
from altprop.lab.cli import main
from altprop.lab.display import counting
from altprop.lab.reference import (
    REFERENCE,
    Rest,
    Sizes,
    make_arms,
    make_trial,
    reference_trial,
    relax,
)
from altprop.lm.text import Corpus, load_corpus

SMALL: dict[str, Any] = {"batch": 2, "context": 8, "d_model": 16, "heads": 2, "repeats": 0}
SIZES = Sizes(batch=2, context=8, d_model=16, heads=2)
ROWS = [
    "EP (published)",
    "AEP (published)",
    "AEP (published, T2=40)",
    "AEP (published, T2=80)",
    "AEP (published, T2=160)",
    "EP",
    "AEP",
    "Implicit",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a text of twenty letters."""
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrst", k=2000)))
    return str(path)


@pytest.fixture(scope="module")
def corpus(text: str) -> Corpus:
    return load_corpus(text)


@pytest.fixture(scope="module")
def written(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[AuditReport, Path]:
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:  # what it costs is a matter of test_audit.py
        patch.setattr("altprop.auditing.measure.peak_live_bytes", lambda *_: 1)
        report = audit(
            data=text, seeds=2, **SMALL, json=folder / "audit.json", png=folder / "audit.png"
        )
    return report, folder


def test_the_json_file_has_the_promised_form(written: tuple[AuditReport, Path], text: str) -> None:
    content = json.loads((written[1] / "audit.json").read_text())
    assert [row["estimator"] for row in content["rows"]] == ROWS
    for row in content["rows"]:
        assert list(row["parameters"]) == ["W_Q", "W_K", "W_V", "W_O"]
        for figures in row["parameters"].values():
            for name in ("cosine", "norm_ratio", "relative_error", "sign_agreement"):
                assert isinstance(figures[name], float)
                assert isinstance(figures["worst"][name], float)
        assert row["evaluations"] > 0
        assert len(row["per_trial"]["cosine"]) == 2
    assert content["reference"]["name"] == "BPTT, 120 Euler steps of 0.1"
    assert content["seeds"] == [0, 1] and content["trials"] == ["seed 0", "seed 1"]
    checked = content["finite_difference"]
    assert checked["relative_error"] < 1e-8 and checked["dtype"] == "float64"
    assert checked["instance"]["d_model"] == 16 and list(checked["parameters"])[0] == "W_Q"
    assert content["free_phase"]["verdict"].startswith("stable fixed point")
    assert content["free_phase"]["step_residual"] == pytest.approx(
        0.1 * content["free_phase"]["force_residual"]
    )
    assert content["problem"]["corpus"]["vocabulary"] == 20
    assert content["versions"]["torch"] == torch.__version__
    assert content["command"].startswith(f"altprop audit --data {text} --seeds 2 --seed 0")


def test_exact_rows_agree_and_published_ones_do_not(written: tuple[AuditReport, Path]) -> None:
    rows = {row.arm.name: row for row in written[0].rows}
    for name in ("AEP", "Implicit"):
        assert rows[name].worst("cosine") > 0.9999
        assert rows[name].worst("norm_ratio") == pytest.approx(1, abs=1e-3)
    for name in ROWS[:6]:
        assert rows[name].worst("cosine") < 0.9999


def test_published_rows_relax_as_published_and_the_others_solve(
    written: tuple[AuditReport, Path],
) -> None:
    evaluations = {row.arm.name: row.as_dict()["evaluations"] for row in written[0].rows}
    free = 122  # 120 steps, the start and the certificate
    assert [evaluations[name] - free for name in ROWS[:5]] == [40, 121, 241, 481, 961]
    assert all(evaluations[name] < 60 for name in ROWS[5:])


def test_a_picture_is_drawn_and_nothing_else_is_left(written: tuple[AuditReport, Path]) -> None:
    assert sorted(path.name for path in written[1].iterdir()) == ["audit.json", "audit.png"]
    assert (written[1] / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_draws_the_same_problem_whatever_was_drawn_before(corpus: Corpus) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, x, y = reference_trial(corpus, SIZES, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # and what is drawn after stays the same too
    torch.manual_seed(6)
    second, again, _ = reference_trial(corpus, SIZES, seed=3)
    other, elsewhere, _ = reference_trial(corpus, SIZES, seed=4)
    assert torch.equal(x, again) and not torch.equal(x, elsewhere)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


def test_the_problem_has_the_scales_of_its_definition(corpus: Corpus) -> None:
    model, *_ = reference_trial(corpus, replace(SIZES, d_model=256), seed=0)
    assert float(model.embedding.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.head.std()) == pytest.approx(1 / 16, rel=0.05)
    for weight in model.parameters():
        assert weight.shape == (256, 256) and float(weight.detach().std()) == pytest.approx(
            1 / 16, rel=0.05
        )


def test_a_relaxation_without_a_stable_fixed_point_is_called_so(corpus: Corpus) -> None:
    assert relax(make_trial(corpus, SIZES, 0)).verdict.startswith("stable fixed point")
    wild = relax(make_trial(corpus, replace(SIZES, scale=30.0), 0))
    assert wild.verdict.startswith("no fixed point")
    assert Rest(1e-6, 1e-7, 0.5).verdict.startswith("unstable fixed point")
    assert Rest(float("nan"), float("nan"), float("nan")).verdict.startswith("no fixed point")


def test_arms_are_named_once_each_and_none_is_the_reference() -> None:
    arms = make_arms(100)
    assert [arm.describe().name for arm in arms] == ROWS
    assert REFERENCE not in arms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"rows": ("AEPP",)}, "unknown row 'AEPP': did you mean AEP"),
        ({"rows": ()}, "rows is empty: leave it out, or name some of EP "),
        ({"json": Path("a.json"), "png": Path("a.json")}, "json and png are both a.json"),
        ({"heads": 3}, "heads must divide d_model"),
        ({"batch": 0}, "batch"),
        *(({name: 0}, f"{name} is 0, expected at least 1") for name in ("d_model", "heads")),
        ({"context": 5000}, "a context of 5000 needs 5001"),
        ({"phase_steps": 0}, "max_steps"),
        ({"repeats": -1}, "repeats is -1"),
        ({"json": Path("missing/audit.json")}, "there is no folder missing"),
        ({"png": Path("missing/audit.png")}, "there is no folder missing"),
        ({"data": "missing.txt"}, "no file or folder 'missing.txt'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    text: str, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("computed before the input was checked")

    monkeypatch.setattr("altprop.lab.audit_command.relax", computed)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        audit(**{"data": text, **SMALL, **arguments})
    assert "\n" not in str(caught.value)


def test_the_command_line_prints_tables_that_fit_and_a_longer_nudged_phase_changes_nothing(
    text: str,
    tmp_path: Path,
    written: tuple[AuditReport, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["audit", "--data", text, "--batch=2", "--context=8", "--d_model=16", "--heads=2"]
    words += ["--seeds=1", "--repeats=1", "--rows=AEP,Implicit", "--phase_steps=1000"]
    assert main([*words, "--json", str(file := tmp_path / "audit.json")]) == 0
    before = {row.arm.name: row.per_trial("cosine")[0] for row in written[0].rows}
    rows = json.loads(file.read_text())["rows"]
    assert [row["estimator"] for row in rows] == ["AEP", "Implicit"]
    for row in rows:
        assert row["per_trial"]["cosine"] == [before[row["estimator"]]] and row["milliseconds"] > 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for said in ("AEP", "Implicit", "stable fixed point", "in float64 confirm the reference"):
        assert said in out


GPT = ["--model", "gpt", "--layers", "2", "--d_model", "16", "--heads", "2", "--context", "16"]


def test_the_gpt_audit_follows_each_rule_layer_by_layer_while_it_trains(
    text: str, tmp_path: Path
) -> None:
    json_file, png = tmp_path / "rules.json", tmp_path / "rules.png"
    words = ["audit", "--data", text, *GPT, "--batch", "4", "--steps", "8"]
    words += ["--rules", "SignSymmetry,DirectFeedback,KolenPollack"]
    assert main([*words, "--json", str(json_file), "--png", str(png)]) == 0
    data = json.loads(json_file.read_text())
    assert data["reference"]["name"] == "backprop"
    assert set(data["controls"]) == {"backprop", "frozen"}
    assert list(data["rules"]) == ["SignSymmetry", "DirectFeedback", "KolenPollack"]
    assert all(rule["steps"] == [0, 2, 4, 6, 8] for rule in data["rules"].values())
    rows = {row["estimator"]: row["parameters"] for row in data["rows"]}
    assert list(rows) == [f"{name}, step {at}" for name in data["rules"] for at in range(0, 9, 2)]
    for layers in rows.values():
        assert list(layers) == ["tokens", "positions", "blocks.0", "blocks.1", "norm", "head"]
        # what stands above every rule is exact
        assert layers["head"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert rows["DirectFeedback, step 0"]["tokens"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert rows["SignSymmetry, step 0"]["tokens"]["cosine"] < 0.99
    assert png.stat().st_size > 10_000


@pytest.mark.parametrize(("count", "places"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3])])
def test_the_gpt_audit_trains_for_exactly_the_steps_that_were_asked_for(
    count: int, places: list[int], text: str, tmp_path: Path
) -> None:
    file = tmp_path / "rules.json"
    words = ["--rules", "SignSymmetry", "--steps", str(count), "--json", str(file)]
    assert main(["audit", "--data", text, *GPT, "--batch", "2", *words]) == 0
    data = json.loads(file.read_text())
    assert data["rules"]["SignSymmetry"]["steps"] == places
    value = json.dumps([data["rules"]["SignSymmetry"]["value"]])
    words = ["--rules", value, "--layers", "2", "--steps", str(count)]
    assert shlex.split(data["command"])[-6:] == words
    assert bool(data["controls"]) == (count > 0)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([*GPT], "--model gpt needs rules"),
        ([*GPT, "--rules", "SignSymmetry", "--seeds", "5"], "has no --seeds"),
        (["--rules", "SignSymmetry"], "has no --rules"),
        (["--model", "gtp"], "did you mean gpt?"),
        ([*GPT, "--rules", "SignSymmetry,SignSymmetry"], "named twice"),
        ([*GPT, "--rules", "SignSymmetry", "--steps", "-4"], "steps is -4, expected at least 0"),
    ],
)
def test_options_of_the_other_audit_are_refused(
    words: list[str], part: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--data", text, *words]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


LONG = {
    "reference": ["audit", "--seeds=2", "--repeats=1", "--rows=AEP,Implicit", "--context=8"],
    "gpt": ["audit", *GPT, "--steps=3", "--rules=SignSymmetry,FeedbackAlignment"],
    "gpt at its start": ["audit", *GPT, "--rules=SignSymmetry"],
    "end of a run": ["train", *GPT, "--steps=1", "--sample=0", "--out=run"],
}


@pytest.mark.parametrize("words", LONG.values(), ids=LONG)
@pytest.mark.usefixtures("no_curves")
def test_what_takes_long_counts_exactly_what_it_computes(
    words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, int]] = []

    @contextmanager
    def counted(total: int, what: str, quiet: bool = False) -> Iterator[Callable[[], None]]:
        made: list[int] = []
        yield lambda: made.append(1)
        seen.append((len(made), total))

    for module in ("audit_command", "audit_gpt", "train"):
        monkeypatch.setattr(f"altprop.lab.{module}.counting", counted)
    assert main([*words, "--data", text, "--d_model=16", "--heads=2", "--batch=2"]) == 0
    ((made, total),) = seen
    assert made == total > 0


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_long_shows_on_a_terminal_alone_how_far_it_is_and_the_time_left(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    monkeypatch.setattr("altprop.lab.display.Console", lambda **_: console)
    with counting(4, "gradient") as count:
        for _ in range(3):
            count()
    assert ("gradient 3/4" in out.getvalue() and "left" in out.getvalue()) == terminal
    assert terminal or not out.getvalue().strip()
