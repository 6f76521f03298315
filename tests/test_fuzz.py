"""A few hundred malformed inputs of every kind; `python tests/fuzz.py` makes as many as wanted."""

from __future__ import annotations

import pytest

import fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in fuzz.KINDS if kind != "checkpoint"])
def test_malformed_input_is_refused_in_one_line_and_changes_nothing(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzz.fuzz(40, seed=11, kinds=[kind]) == 0, capsys.readouterr().out


def test_the_judge_finds_what_is_no_refusal() -> None:
    line, files = "altprop: error: no\n", {"a": b"1"}
    assert fuzz.judge(2, "", line, files, files) == ""
    assert fuzz.judge(0, "done", "", files, {}) == ""
    for status, err, after in [
        (2, line * 2, files),
        (2, line[:-1], files),
        (2, "no\n", files),
        (2, line, {"a": b"2"}),
        (2, line, {}),
        (2, "altprop: error: \x1b[2J\n", files),
        (2, f"altprop: error: {'x' * 3000}\n", files),
        (1, "Traceback\n", files),
        (130, line, files),
    ]:
        assert fuzz.judge(status, "", err, files, after)
