"""The command line calls a function with exactly what was asked for, or says what to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from altprop.lab.cli import Commands, main


class AbstractSolver(ABC):
    @abstractmethod
    def solve(self) -> None: ...


@dataclass(frozen=True)
class Anderson(AbstractSolver):
    """Mix the last iterates.

    Args:
        tol: Residual at which to stop.
    """

    tol: float = 1e-4
    memory: int = 5

    def solve(self) -> None: ...


@dataclass(frozen=True)
class Picard(AbstractSolver):
    tol: float = 1e-2

    def solve(self) -> None: ...


class AbstractEstimator(ABC):
    @abstractmethod
    def estimate(self) -> None: ...


@dataclass(frozen=True)
class AEP(AbstractEstimator):
    beta: float = 1e-3
    tol: float = 1e-4
    solver: AbstractSolver | None = Picard(0.5)

    def estimate(self) -> None: ...


@dataclass(frozen=True)
class EP(AbstractEstimator):
    beta: float = 0.1
    sign: int = 1

    def estimate(self) -> None: ...


@dataclass(frozen=True)
class TrainConfig:
    """What a run is.

    Args:
        steps: Number of optimiser steps,
            100% of them.
        estimator: How gradients are estimated.
    """

    steps: int = 1000
    learning_rate: float = 3e-4
    out: Path = Path("runs/a")
    name: str | None = None
    log: Path | None = None
    estimator: AbstractEstimator = AEP(tol=1e-5)
    stabiliser: AbstractSolver | None = Anderson()
    compile: bool = False
    colour: Literal["red", "blue"] = "red"
    betas: tuple[float, float] = (0.9, 0.95)


CALLS: list[Any] = []


def train(config: TrainConfig) -> None:
    """Train a model."""
    CALLS.append(config)


def sample(run: Path, /, *, prompt: str = "\n", tokens: int = 500, seed: int | None = None) -> None:
    """Write text.

    Args:
        run: Folder of the run.
        tokens: How many to write.
    """
    CALLS.append((run, prompt, tokens, seed))


SIGNATURE_SOLVER = Anderson(memory=9)


def data(corpus: str = "plays", *, solver: AbstractSolver = SIGNATURE_SOLVER) -> None:
    CALLS.append((corpus, solver))


TABLE: Commands = {
    f.__name__: (f"{__name__}:{f.__name__}", f"What {f.__name__} does.")
    for f in (train, sample, data)
}


def call(*argv: str) -> Any:
    """Run the command line and return what the command was called with."""
    CALLS.clear()
    assert main(argv, TABLE) == 0
    assert len(CALLS) == 1
    return CALLS[0]


# What a command is called with


def test_without_options_a_command_gets_the_defaults_of_its_signature() -> None:
    assert call("sample", "runs/a") == (Path("runs/a"), "\n", 500, None)
    assert call("data") == ("plays", SIGNATURE_SOLVER)


def test_a_positional_is_taken_by_place_wherever_it_stands() -> None:
    assert call("sample", "--tokens", "7", "a") == (Path("a"), "\n", 7, None)
    assert call("sample", "a", "--seed=3", "--prompt=--x") == (Path("a"), "--x", 500, 3)
    assert call("sample", "--seed", "-1", "--", "-a") == (Path("-a"), "\n", 500, -1)
    assert call("data", "my.txt")[0] == "my.txt"


OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--steps", "5"], {"steps": 5}),
    (["--steps=5", "--steps=6"], {"steps": 6}),
    (["--learning-rate", "1e-3"], {"learning_rate": 1e-3}),
    (["--learning_rate", "2"], {"learning_rate": 2.0}),
    (["--out", "a b"], {"out": Path("a b")}),
    (["--log", "x"], {"log": Path("x")}),
    (["--name", "5"], {"name": "5"}),
    (["--name", "null"], {"name": None}),
    (["--compile"], {"compile": True}),
    (["--compile", "--steps", "1"], {"compile": True, "steps": 1}),
    (["--compile", "false"], {"compile": False}),
    (["--colour", "blue"], {"colour": "blue"}),
    (["--betas", "0.1,0.2"], {"betas": (0.1, 0.2)}),
    (["--betas", "[0.1, 1e-3]"], {"betas": (0.1, 1e-3)}),
    (["--estimator", "EP"], {"estimator": EP()}),
    (["--estimator", "AEP"], {"estimator": AEP()}),
    (["--estimator", "AEP", "--estimator.tol", "1e-3"], {"estimator": AEP(tol=1e-3)}),
    (["--estimator.beta", "0.01"], {"estimator": AEP(beta=0.01, tol=1e-5)}),
    (["--estimator.beta", "9", "--estimator", "EP"], {"estimator": EP()}),
    (["--estimator", "EP(0.2)", "--estimator.sign=-1"], {"estimator": EP(0.2, sign=-1)}),
    (
        ["--estimator", "AEP(1, solver=Anderson(memory=3))"],
        {"estimator": AEP(1.0, solver=Anderson(memory=3))},
    ),
    (
        ["--estimator", "AEP(solver=None)", "--estimator.tol=2"],
        {"estimator": AEP(tol=2.0, solver=None)},
    ),
    (
        ["--estimator.solver", "Anderson(1)", "--estimator.solver.memory", "2"],
        {"estimator": AEP(tol=1e-5, solver=Anderson(1.0, 2))},
    ),
    (["--stabiliser", "None"], {"stabiliser": None}),
    (["--estimator.solver.tol", "3"], {"estimator": AEP(tol=1e-5, solver=Picard(3.0))}),
    (["--estimator.solver", "Anderson"], {"estimator": AEP(tol=1e-5, solver=Anderson())}),
    (["--estimator.solver", "null"], {"estimator": AEP(tol=1e-5, solver=None)}),
    (["--stabiliser", "null"], {"stabiliser": None}),
    (["--stabiliser", "Picard", "--stabiliser", "Anderson"], {"stabiliser": Anderson()}),
]


@pytest.mark.parametrize(("argv", "fields"), OPTIONS, ids=str)
def test_options_set_the_fields_that_they_name_and_print_config_reads_back_to_the_same(
    argv: list[str], fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = call("train", *argv)
    assert asked == TrainConfig(**fields)
    CALLS.clear()
    assert main(["train", *argv, "--print_config"], TABLE) == 0
    assert not CALLS
    printed = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    assert call("train", "--config", str(file)) == replace(asked, out=TrainConfig().out)
    assert main(["train", f"--config={file}", "--print-config"], TABLE) == 0
    assert capsys.readouterr().out == printed


def test_print_config_of_a_function_holds_its_positional_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = call("sample", "a", "--prompt", "null", "--tokens", "9")
    assert main(["sample", "a", "--prompt", "null", "--tokens", "9", "--print_config"], TABLE) == 0
    file = tmp_path / "sample.yaml"
    file.write_text(capsys.readouterr().out)
    assert call("sample", "--config", str(file)) == asked
    assert call("sample", "b", "--config", str(file)) == (Path("b"), *asked[1:])


def test_words_win_over_files_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("steps: 1\nname: a\nestimator: EP(beta=2)\n")
    second.write_text("name: b\n")
    argv = ["--steps", "9", "--config", str(first), "--config", str(second)]
    assert call("train", *argv) == TrainConfig(steps=9, name="b", estimator=EP(2.0))
    assert call("train", *argv, "--estimator.sign=-1").estimator == EP(2.0, -1)
    # A class named on the command line starts afresh: beta is that of EP's signature.
    assert call("train", *argv, "--estimator", "EP").estimator == EP()


def test_a_class_named_in_a_file_takes_over_nothing_from_the_class_before(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("estimator: AEP(beta=9)\nstabiliser: Picard\n")
    second.write_text("estimator: EP(sign=-1)\n")
    config = call("train", "--config", str(first))
    assert config.estimator == AEP(beta=9.0)  # and nothing of the option's own default
    assert config.stabiliser == Picard()
    argv = ["--config", str(first), "--config", str(second)]
    assert call("train", *argv).estimator == EP(sign=-1)
    assert call("train", *argv, "--estimator", "AEP").estimator == AEP()


# Help


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run the command line and return what it prints, without line breaks."""
    assert main(argv, TABLE) == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_of_a_command_shows_types_defaults_and_documentation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = shown(capsys, "train", "--help")
    assert out.startswith("usage: altprop train [--option VALUE ...] Train a model. options:")
    assert "options: --steps Number of optimiser steps, 100% of them. (a whole number; def" in out
    assert "How gradients are estimated. (an estimator; default: AEP(tol=1e-05))" in out
    assert out.endswith("estimator AEP, EP solver Anderson, Picard")
    assert "--name (text or null; default: null)" in out
    assert "--import import a Python module first" in out


def test_help_of_a_class_shows_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "train", "--stabiliser.help", "Anderson")
    assert "--stabiliser.tol Residual at which to stop. (a number; default: 0.0001)" in out
    sign = "--estimator.sign (a whole number; default: 1)"
    assert sign in shown(capsys, "train", "--estimator.help=EP")
    assert sign not in shown(capsys, "train", "--estimator.help")  # the default's, which is AEP's


def test_help_needs_no_positional_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    CALLS.clear()
    out = shown(capsys, "sample", "--print_config", "-h")
    assert out.startswith("usage: altprop sample RUN [--option VALUE ...] ")
    assert "--run Folder of the run. (a path; required)" in out
    assert shown(capsys, "data", "--help").startswith("usage: altprop data [CORPUS] [--option")
    assert not CALLS


# Bad input


BAD: list[tuple[list[str], str]] = [
    (["trian"], "unknown command 'trian': did you mean train? Known: data, sample, train"),
    (["--steps", "5"], "unknown option --steps: write a command first, one of train, sample,"),
    (["train", "--stepz", "5"], "unknown option --stepz: did you mean --steps?"),
    (["train", "--step", "5"], "unknown option --step: did you mean --steps?"),
    (["train", "--est", "EP"], "unknown option --est: did you mean --estimator?"),
    (["train", "--memory", "5"], "unknown option --memory: did you mean --stabiliser.memory?"),
    (["train", "-s", "5"], "unknown option -s: altprop train --help lists the options"),
    (["train", "steps"], "unexpected argument 'steps': altprop train --help lists the options"),
    (["sample", "a", "b"], "unexpected argument 'b'"),
    (["sample"], "RUN is missing"),
    (["train", "--steps", "x"], "--steps: expected a whole number, got 'x'"),
    (["train", "--steps", "1.5"], "--steps: expected a whole number, got '1.5'"),
    (["train", "--learning-rate", "x"], "--learning_rate: expected a number, got 'x'"),
    (["train", "--compile=x"], "--compile: expected true or false, got 'x'"),
    (["train", "--colour", "x"], "--colour: expected one of red, blue, got 'x'"),
    (["train", "--betas", "1"], "--betas: expected a list of 2 times a number, got [1]"),
    (["train", "--betas", "[1"], "--betas: cannot read '[1' ('[' was never closed)"),
    (["train", "--steps"], "--steps: expected a value"),
    (["train", "--config"], "--config: expected a value"),
    (
        ["train", "--estimator", "AEPP"],
        "--estimator: unknown class 'AEPP': did you mean AEP? Known: AEP, EP",
    ),
    (["train", "--estimator", "Anderson"], "--estimator: unknown class 'Anderson'"),
    (
        ["train", "--estimator.betta", "1"],
        "unknown option --estimator.betta of AEP: did you mean --estimator.beta?",
    ),
    (
        ["train", "--estimator", "EP", "--estimator.solver", "Picard"],
        "unknown option --estimator.solver of EP: it takes beta, sign",
    ),
    (["train", "--estimator.beta", "x"], "--estimator.beta: expected a number, got 'x'"),
    (
        ["train", "--stabiliser", "null", "--stabiliser.tol", "1"],
        "--stabiliser: name a class first, one of Anderson, Picard",
    ),
    (["train", "--name", "[1", "--estimator", "3"], "--estimator: expected one of AEP, EP, got 3"),
    (["train", "--estimator", "null"], "--estimator: expected one of AEP, EP, got null"),
    (["train", "--steps.x", "1"], "unknown option --steps.x: --help lists the options"),
    (["train", "--config.x", "1"], "unknown option --config.x: did you mean --config?"),
    (["train", "--name.help"], "unknown option --name.help: --name takes no class"),
    (["train", "--estimator.help", "EPP"], "--estimator: unknown class 'EPP': did you mean EP?"),
    (["train", "--config="], ".: Is a directory"),
    (["train", "--import", "./my.py"], "--import ./my.py: expected the name of a module"),
    (["train", "--config", "none.yaml"], "none.yaml: No such file or directory"),
    (["train", "--config", "."], ".: Is a directory"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_answered_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CALLS.clear()
    assert main(argv, TABLE) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"altprop: error: {message}")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert not out and not CALLS
