"""The help of every command fits two screens, and names every choice once."""

from __future__ import annotations

import re

import pytest

import altprop as ap
from altprop.lab.choices import choices, defaults_of, types_of
from altprop.lab.cli import COMMANDS, main
from altprop.lab.help import brief
from altprop.lab.settings import TrainConfig
from altprop.lab.values import fit


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: altprop {command}")
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_two_screens_of_100_columns(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(command, capsys).splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100


def test_help_lists_the_same_rules_for_every_command_that_takes_them_each_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rules = choices(ap.AbstractRule)
    for command in ("train", "audit", "explain"):
        _, _, end = printed(command, capsys).partition("\nchoices:")
        words = re.findall(r"\w+", end.partition("\n")[2])
        assert [name for name in rules if words.count(name) != 1] == []


def test_a_default_that_help_shows_reads_back_to_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = " ".join(printed("train", capsys).split())
    types = types_of(TrainConfig)
    for name, value in defaults_of(TrainConfig).items():
        assert f"default: {brief(value)})" in shown, name
        if not isinstance(value, (dict, type(None))):
            assert fit(types[name], brief(value), name) == value, name
