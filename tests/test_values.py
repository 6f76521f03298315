"""A value reads back from its own repr, and no text does anything but say a value."""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import altprop as ap
from altprop.errors import ConfigError
from altprop.lab.choices import choices, types_of
from altprop.lab.cli import main
from altprop.lab.config import read_config, write_config
from altprop.lab.help import brief
from altprop.lab.settings import TrainConfig
from altprop.lab.values import DEEPEST, LONGEST, Call, fit, parse, plain

BASES = (ap.AbstractRule, ap.AbstractEstimator, ap.AbstractSolver, ap.AbstractStabiliser)
# not those of other tests
ALL = [
    (base, n) for base in BASES for n, c in choices(base).items() if c.__module__[:7] == "altprop"
]


# Every choice reads back


def others(hint: Any, before: Any) -> list[Any]:
    """Return values of a type other than `before`, among which a class will take one."""
    members = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return [value for value in members if value != before]
    if typing.get_origin(hint) is tuple:
        return [(ap.Euler(step=0.3),)]
    found: list[Any] = []
    for member in members:
        found += {int: [3, 4, 2], float: [0.25, 1e-7], bool: [not before]}.get(member, [])
        if member is ap.AbstractSolver:
            found.append(ap.Anderson(tol=1e-5, max_steps=7))
    words = "uniform orthogonal zeros none frobenius hidden mean magnitude concat sublayer block"
    return found + words.split() * (hint is str)


def changed_everywhere(base: type, name: str) -> Any:
    """Return the choice with as many of its fields at another value as it takes."""
    value: Any = choices(base)[name]()
    for field, hint in types_of(type(value)).items():
        for other in others(hint, getattr(value, field)):
            try:
                value = replace(value, **{field: other})
            except ap.AltpropError:
                continue
            break
    return value


@pytest.mark.parametrize(("base", "name"), ALL, ids=lambda part: getattr(part, "__name__", part))
def test_every_choice_reads_back_from_its_repr(base: type, name: str, tmp_path: Path) -> None:
    default, changed = choices(base)[name](), changed_everywhere(base, name)
    for value in (default, changed):
        assert fit(base, repr(value), "x") == value
        assert type(fit(base, repr(value), "x")) is type(value)
        assert plain(value) == repr(value)
        assert fit(base, brief(value), "x") == value
    assert brief(default) == f"{name}()"
    assert (default != changed) == bool(types_of(type(default)))
    assert fit(base, name, "x") == fit(base, f" {name}( ) ", "x") == default


def test_the_choices_are_the_concrete_exports_of_altprop() -> None:
    assert {"AEP", "Implicit"} < set(choices(ap.AbstractEstimator)) < set(choices(ap.AbstractRule))
    for base in BASES:
        found = {k: cls for k, cls in choices(base).items() if cls.__module__[:7] == "altprop"}
        assert set(found) <= set(ap.__all__)
        assert not any(map(inspect.isabstract, found.values()))


floats = st.floats(allow_nan=False, allow_infinity=True)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(plain_values)
def test_plain_python_reads_as_itself(value: Any) -> None:
    assert parse(repr(value)) == value
    assert parse(f"A(1, x={value!r})") == Call("A", (1,), {"x": value})
    assert parse(repr(Call("A", (value,), {"y": value}))) == Call("A", (value,), {"y": value})


@settings(max_examples=100, deadline=None)
@given(
    st.floats(min_value=1e-300, max_value=1e300),
    st.integers(1, 10**6),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_any_numbers_of_a_choice_read_back(tol: float, steps: int, sides: Any, some: bool) -> None:
    solver = ap.Fallback((ap.FixedPoint(tol), ap.Anderson(max_steps=steps))) if some else None
    value = ap.AEP(tol=tol, max_steps=steps, sides=sides, solver=solver)
    assert fit(ap.AbstractEstimator, repr(value), "x") == value


def test_a_printed_configuration_is_short_and_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    for more in ([], ["--estimator", "DyadicEP", "--solver.tol", "1e-2"]):
        assert main(["train", *more, "--print_config"]) == 0
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) == len(yaml.safe_load(printed))  # a line each
        file.write_text(printed, encoding="utf-8")
        assert main(["train", "--config", str(file), "--print_config"]) == 0
        assert capsys.readouterr().out == printed
    assert read_config(file, TrainConfig).estimator == ap.DyadicEP()


# No text does anything


HOSTILE = [
    "os.system('touch {mark}')",
    "__import__('os').system('touch {mark}')",
    "marking.Rule()",
    "marking",
    "marking()",
    "AEP(tol=__import__('marking'))",
    "AEP(tol=exec('import marking'))",
    "AEP(solver=marking.Solver)",
    "AEP(tol=(lambda: 1)())",
    "AEP(tol=[x for x in (1,)])",
    "AEP(tol=max(1, 2))",
    "AEP(tol=2**9)",
    "AEP(tol=1 if 1 else 2)",
    "AEP(tol=(x := 1))",
    "AEP(tol=f'{{1}}')",
    "AEP(tol=AEP().tol)",
    "AEP(*(1,))",
    "AEP(**{{'tol': 1}})",
    "AEP(__class__=1)",
    "AEP.__init__(1)",
    "AEP()()",
    "(AEP)().tol",
    "AEP or EP",
    "{{'class_path': 'marking.Rule'}}",
    "import marking",
    "AEP(); import marking",
    "AEP(\n",
    "",
    "'''",
    "AEP(tol=1j)",
    "AEP(tol=b'1')",
    "AEP(tol=...)",
    "ap.AEP()",
    "\0",
    "\ud800",
    "AEP(tol='\\d')",
    "A" * 9000,
    "AEP(" + "x" * 9000 + "=1)",
    "(" * 9000,
    "-" * 9000 + "1",
    "1+" * 4000 + "1",
    "a." * 4000 + "a",
    "not " * 2400 + "1",
    "AEP(tol=0x" + "f" * 9000 + ")",
    "9" * 9000,
    "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2),
    "AEP(solver=" * 40 + "1" + ")" * 40,
    "AEP(" + " " * LONGEST + ")",
]


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if the module `marking`, which can be imported, ever is."""
    path = tmp_path / "mark"
    (tmp_path / "marking.py").write_text(f"open({str(path)!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:30]))
def test_a_text_that_is_no_value_is_one_line_and_does_nothing(
    text: str, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text.format(mark=mark) if "{" in text else text
    main(["train", "--print_config"])  # imports what the command itself needs
    capsys.readouterr()
    modules = set(sys.modules)
    with pytest.raises(ConfigError) as caught:
        fit(ap.AbstractEstimator, text, "estimator")
    told = str(caught.value)
    assert "\n" not in told and len(told) < 600
    assert told.startswith(("estimator", "unknown option estimator."))
    file = mark.parent / "run.yaml"
    for spec in (text, {"class_path": text}, {"class_path": "AEP", "init_args": {"solver": text}}):
        if text.isascii():
            file.write_text(json.dumps({"estimator": spec}), encoding="utf-8")
            assert main(["train", "--config", str(file), "--print_config"]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert set(sys.modules) == modules
    assert not mark.exists()


def test_a_text_may_be_as_long_and_as_deep_as_it_says() -> None:
    assert parse("A(" + " " * (LONGEST - 3) + ")") == Call("A")
    deep = parse("[" * DEEPEST + "1" + "]" * DEEPEST)
    for _ in range(DEEPEST):
        (deep,) = deep
    assert deep == 1
    for much, told in ((f"{'[' * 31}1{']' * 31}", "30 levels"), ("1" * 10001, "10001")):
        with pytest.raises(ConfigError, match=told):
            parse(much)


# Mistakes


MISTAKES = [
    ("AEPP", "x: unknown class 'AEPP': did you mean AEP? Known: AEP, BPTT"),
    ("implicit", "unknown class 'implicit': did you mean Implicit?"),
    ("GMRES()", "unknown class 'GMRES': Known: AEP"),
    ("AEP(toll=1)", "unknown option x.toll of AEP: did you mean x.tol?"),
    ("AEP(solver=GMRS())", "x.solver: unknown class 'GMRS': did you mean GMRES?"),
    ("AEP(solver=GMRES(restarts=3))", "x.solver.restarts of GMRES: did you mean x.solver.restart?"),
    ("AEP(tol='small')", "x.tol: expected a number, got 'small'"),
    ("AEP(max_steps=1.5)", "x.max_steps: expected a whole number, got 1.5"),
    ("AEP(nudge='linaer')", "x.nudge: expected one of linear, cost, got 'linaer'"),
    ("AEP(sides=True)", "x.sides: expected one of 1, 2, 4, got True"),
    ("AEP(sides=3)", "x.sides: expected one of 1, 2, 4, got 3"),
    ("OneStep(certify=1)", "x.certify: expected true or false, got 1"),
    ("BPTT(3)", "x: 1 values for BPTT: it takes nothing"),
    ("OneStep(1, k=2)", "x: 'k' stands twice: keep one of them"),
    ("OneStep(k=1, k=2)", "x: 'k' stands twice: keep one of them"),
    ("AEP(tol=1", "x: cannot read 'AEP(tol=1' ('(' was never closed): write it as in Python"),
    ("altprop.AEP", "x: 'altprop.AEP' cannot stand in a value: write numbers, texts, lists,"),
    ("3", "x: expected one of AEP, BPTT"),
    ("AEP(tol=-1)", "tol"),
]


@pytest.mark.parametrize(("text", "told"), MISTAKES)
def test_a_mistake_is_answered_with_what_to_write_instead(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(ap.AbstractEstimator, text, "x")
    assert told in str(caught.value) and "\n" not in str(caught.value)


# Classes of one's own


MINE = """
from dataclasses import dataclass
from altprop import AbstractStabiliser

@dataclass(frozen=True)
class {name}(AbstractStabiliser):
    strength: float = 1.0
    shape: tuple[int, ...] = ()
    def init(self, *args, **kwargs): ...
    def apply(self, *args, **kwargs): ...
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write a module of one's own into the working folder, with one class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name: str, text: str = MINE) -> None:
        Path(f"{name.lower()}.py").write_text(text.format(name=name), encoding="utf-8")
        monkeypatch.delitem(sys.modules, name.lower(), raising=False)

    return write


def test_a_module_of_ones_own_is_known_once_the_command_line_imports_it(
    mine: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    mine("OwnHinge")
    words = ["train", "--stabiliser", "OwnHinge(2, shape=[1, 2])", "--print_config"]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert "unknown class 'OwnHinge': did you mean" in line and "--import MODULE" in line
    assert main([*words, "--import", "ownhinge"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["stabiliser"] == "OwnHinge(strength=2.0, shape=(1, 2))"
    file = Path("run.yaml")
    config = replace(TrainConfig(), stabiliser=sys.modules["ownhinge"].OwnHinge(3.0))
    write_config(file, config)
    assert read_config(file, TrainConfig) == config


def test_a_file_imports_nothing(
    mine: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    mine("FileHinge")
    for text in ("import: filehinge\n", "stabiliser: filehinge.FileHinge()\n"):
        Path("run.yaml").write_text(text, encoding="utf-8")
        assert main(["train", "--config", "run.yaml", "--print_config"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert "filehinge" not in sys.modules


def test_a_module_that_is_not_there_is_one_line(
    mine: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--import", "nowhere.rules", "--print_config"]) == 2
    assert capsys.readouterr().err == (
        "altprop: error: --import nowhere.rules: No module named 'nowhere'\n"
    )


def test_no_class_of_ones_own_passes_for_an_export(
    mine: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    shared = MINE.replace("strength", "weight").replace("    shape: tuple[int, ...] = ()\n", "")
    mine("JacobianHinge", shared)  # even its repr could be one of the export's
    words = ["train", "--import", "jacobianhinge", "--stabiliser", "JacobianHinge"]
    assert main([*words, "--print_config"]) == 0
    assert "token_target" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a configuration cannot hold JacobianHinge"):
        plain(sys.modules["jacobianhinge"].JacobianHinge())
