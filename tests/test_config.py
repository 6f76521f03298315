"""A configuration that is written reads back as the same value, and says what is wrong if not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from altprop.errors import ConfigError
from altprop.lab.config import read_config, read_values, to_yaml, write_config
from altprop.lab.values import fit
from altprop.lab.words import changed


class AbstractShape(ABC):
    @abstractmethod
    def area(self) -> float: ...


@dataclass(frozen=True)
class Circle(AbstractShape):
    radius: float = 1.0
    inner: AbstractShape | None = None

    def area(self) -> float:
        return 3 * self.radius**2


@dataclass(frozen=True)
class Square(AbstractShape):
    side: float
    radius: float = 7.0

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class _Private(AbstractShape):
    def area(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Config:
    steps: int = 10
    rate: float = 1e-5
    name: str | None = None
    text: str = "\n"
    out: Path = Path("runs/a")
    shape: AbstractShape = Circle(2.0)
    spare: AbstractShape | None = Square(3.0)
    folder: Path | None = None
    kind: Literal["wide", 3] = "wide"
    mode: Literal["skip", "stop"] = "skip"
    betas: tuple[float, float] = (0.9, 0.95)
    shapes: tuple[AbstractShape, ...] = (Circle(), Square(1.0))
    places: Mapping[str, AbstractShape] = field(default_factory=dict)
    rule: AbstractShape | Mapping[str, AbstractShape] = Circle()


CONFIGS = [
    Config(),
    Config(
        steps=-1,
        rate=float("inf"),
        folder=Path("None"),
        name="1e-3",
        text="null",
        out=Path("/x y/é"),
    ),
    Config(shape=Square(2.0, 1e-9), spare=None, kind=3),
    Config(shape=Circle(1.0, Circle(3.0, Square(4.0))), shapes=(), betas=(1e16, 0.0)),
    Config(places={"blocks.*.attn": Circle(), "head": Square(2.0)}, rule={"a.*": Square(1.0)}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_written_configuration_reads_back_equal(config: Config, tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", config)
    assert read_config(tmp_path / "run.yaml", Config) == config


@dataclass(frozen=True)
class Plain:
    steps: int = 10
    rate: float = 1e-5
    name: str | None = None
    text: str = "\n"


@settings(max_examples=60, deadline=None)
@given(st.text(), st.none() | st.text(), st.floats(allow_nan=False), st.integers())
def test_any_text_and_number_survives_yaml(
    tmp_path_factory: pytest.TempPathFactory, text: str, name: str | None, rate: float, steps: int
) -> None:
    config = Plain(text=text, name=name, rate=rate, steps=steps)
    file = tmp_path_factory.mktemp("plain") / "run.yaml"
    write_config(file, config)
    assert read_config(file, Plain) == config


def test_a_file_holds_each_choice_as_its_own_repr_on_one_line(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", replace(CONFIGS[-1], shape=CONFIGS[3].shape))
    lines = (tmp_path / "run.yaml").read_text(encoding="utf-8").splitlines()
    shape = "Circle(radius=1.0, inner=Circle(radius=3.0, inner=Square(side=4.0, radius=7.0)))"
    assert f"shape: {shape}" in lines
    at = lines.index("places:")
    assert lines[at + 1] == "  blocks.*.attn: Circle(radius=1.0, inner=None)"
    assert "spare: Square(side=3.0, radius=7.0)" in lines


def test_fields_that_are_left_out_have_the_defaults_of_the_reader(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", Config(steps=7, rate=9.0), without=["rate"])
    assert read_config(tmp_path / "run.yaml", Config) == Config(steps=7)


UNWRITABLE: list[Any] = [1j, {1, 2}, Circle, _Private(), Circle(inner=_Private())]


@pytest.mark.parametrize("value", UNWRITABLE, ids=repr)
def test_a_value_that_would_not_read_back_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="a configuration cannot hold") as caught:
        to_yaml({"shape": value})
    assert "\n" not in str(caught.value)


def test_a_value_of_a_file_is_whole_and_takes_nothing_from_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("shape: Circle(inner=Square(1))\nspare: Circle\nplaces: {a: Square(side=2)}\n")
    read = read_config(file, Config)
    assert read.shape == Circle(1.0, Square(1.0, 7.0))
    assert read.spare == Circle()
    assert read.places == {"a": Square(2.0)}


def test_a_class_as_older_runs_have_it_is_read(tmp_path: Path) -> None:
    inner = "{class_path: test_config.Square, init_args: {side: 1.0e-3, radius: 2}}"
    (tmp_path / "run.yaml").write_text(
        f"shape:\n  class_path: Circle\n  init_args: {{radius: 2.0, inner: {inner}}}\n"
        f"spare: {{class_path: Circle}}\nplaces:\n  a.*: {inner}\n"
        f"shapes: [{inner}]\nrule: {inner}\n"
    )
    square = Square(1e-3, 2.0)
    assert read_config(tmp_path / "run.yaml", Config) == Config(
        shape=Circle(2.0, square),
        spare=Circle(),
        places={"a.*": square},
        shapes=(square,),
        rule=square,
    )


def test_a_dotted_word_changes_one_field_of_the_value_that_stands_there() -> None:
    def shape(value: Any, path: str, text: str) -> Any:
        after = changed(AbstractShape, value, path.split("."), text, "--shape")
        return fit(AbstractShape, after, "--shape")

    assert shape(Circle(2.0), "inner", "Square(3)") == Circle(2.0, Square(3.0))
    assert shape("Circle(inner=Square(1))", "inner.radius", "9") == Circle(1.0, Square(1.0, 9.0))
    assert shape("Square", "side", "4") == Square(4.0)  # only now whole
    assert shape("Square(1, 2)", "radius", "4") == Square(1.0, 4.0)
    with pytest.raises(ConfigError, match="--shape.inner: name a class first, one of Circle, Sq"):
        shape(Circle(), "inner.side", "4")


BAD: list[tuple[str, str]] = [
    ("stepz: 1", "unknown option stepz: did you mean steps"),
    ("steps: 1.5", "steps: expected a whole number, got 1.5"),
    ("steps: true", "steps: expected a whole number, got True"),
    ("steps: null", "steps: expected a whole number, got null"),
    (f"steps: 0x{'f' * 9000}", "steps: expected a whole number, got a number of too many digits"),
    ("text: 5", "text: expected text, got 5"),
    ("out: 5", "out: expected a path, got 5"),
    ("mode: x", "mode: expected one of skip, stop, got 'x'"),
    ("betas: [1, 2, 3]", r"betas: expected a list of 2 times a number, got \[1, 2, 3\]"),
    ("betas: [1, x]", "betas: expected a number, got 'x'"),
    ("shape: null", "shape: expected one of Circle, Square, got null"),
    ("shape: 5", "shape: expected one of Circle, Square, got 5"),
    ("shape: Sqare", "unknown class 'Sqare': did you mean Square. Known: Circle, Square; --import"),
    ("shape: _Private", "unknown class '_Private'"),
    ("shape: AbstractShape", "unknown class 'AbstractShape'"),
    ("shape: Plain", "unknown class 'Plain'"),
    ("shape: test_config.Circle", "'test_config.Circle' cannot stand in a value"),
    ("shape: Square", r"shape.side is missing: write Square\(side=…\)"),
    ("shape: Circle(1, 2, 3)", "shape: 3 values for Circle: it takes radius, inner"),
    ("shape: Circle(radius=x)", "shape.radius: expected a number, got x()"),
    (
        "shape: Circle(inner=Circle(1, 2))",
        "shape.inner.inner: expected one of Circle, Square or",
    ),
    ("shape: {class_path: Circle, radius: 1}", "shape: expected one of Circle, Square, got"),
    ("shape: {class_path: Circle, init_args: [1]}", "shape: expected one of Circle, Square, got"),
    ("shape: {radius: 1}", "shape: expected one of Circle, Square, got {'radius': 1}"),
    ("spare: Square(q=1)", "unknown option spare.q of Square: it takes side, radius"),
    ("rule: {a.*: Sqare}", r"rule.a.\*: unknown class 'Sqare': did you mean Square"),
    ("rule: Sqare", "rule: unknown class 'Sqare'"),
    ("places: {1: Circle}", "places: the name 1 is no text: write '1'"),
    ("shapes: Circle", r"shapes: expected a list of one of Circle, Square, got Circle\(\)"),
    ("steps: [1", "not valid YAML: .* line 1, column 10"),
    ("- 1", r"expected lines such as 'steps: 1000', got '- 1'"),
    ("steps", "expected lines such as 'steps: 1000', got 'steps'"),
    ("shape.radius: 1", "unknown option shape.radius: did you mean shape"),
    ("steps: " + "[" * 3000, "more than 30 levels in one another"),
    ("steps: 2000-99-99", "not valid YAML: month must be in"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=lambda text: text[:40])
def test_what_does_not_fit_is_one_line_with_the_file_and_the_place(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"run.yaml: .*{message}") as caught:
        read_values(tmp_path / "run.yaml", Config)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_config(tmp_path / "run.yaml", Config)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "run.yaml", Config) == Config()
