"""A configuration that is written reads back as the same value, and says what is wrong if not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import altprop as ap
from altprop.errors import ConfigError
from altprop.lm.config import (
    Parser,
    choices,
    class_path,
    config_dict,
    read_config,
    to_yaml,
    write_config,
)


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


class Colour(Enum):
    RED = "r"
    BLUE = "b"


@dataclass(frozen=True)
class Size:
    width: int = 3
    height: int = 4


@dataclass(frozen=True)
class Config:
    steps: int = 10
    rate: float = 1e-5
    name: str | None = None
    text: str = "\n"
    out: Path = Path("runs/a")
    shape: AbstractShape = Circle(2.0)
    spare: AbstractShape | None = Square(3.0)
    size: Size = Size()
    colour: Colour = Colour.RED
    folder: Path | None = None
    kind: Literal["wide", 3] = "wide"
    mode: Literal["skip", "stop"] = "skip"
    betas: tuple[float, float] = (0.9, 0.95)
    shapes: tuple[AbstractShape, ...] = (Circle(), Square(1.0))
    places: Mapping[str, AbstractShape] = field(default_factory=dict)
    rule: AbstractShape | Mapping[str, AbstractShape] = Circle()


def parsed(cls: Any, *layers: dict[str, Any]) -> Any:
    """Read the layers one over the other, as jsonargparse reads the values of `--config` files."""
    parser = Parser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(cls)
    words = [f"--config={to_yaml(layer)}" for layer in layers]
    return cls(**parser.built(parser.parse_args(words)))


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
    Config(shape=Square(2.0, 1e-9), spare=None, size=Size(1), colour=Colour.BLUE, kind=3),
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
@given(
    st.text(),
    st.none() | st.text().filter(lambda t: t.strip() != "null"),
    st.floats(allow_nan=False),
    st.integers(),
)
def test_any_text_and_number_survives_yaml(
    text: str, name: str | None, rate: float, steps: int
) -> None:
    # jsonargparse takes the text null for nothing where there may be nothing.
    config = Plain(text=text, name=name, rate=rate, steps=steps)
    assert parsed(Plain, config_dict(config)) == config


def test_a_choice_is_written_with_its_class_and_every_field() -> None:
    assert config_dict(Config())["shape"] == {
        "class_path": "test_config.Circle",
        "init_args": {"radius": 2.0, "inner": None},
    }


def test_a_dataclass_that_derives_from_nothing_is_written_as_its_fields() -> None:
    assert config_dict(Config())["size"] == {"width": 3, "height": 4}


def test_exports_of_altprop_are_written_by_their_short_path() -> None:
    assert class_path(ap.AEP) == "altprop.AEP"
    assert class_path(Parser) == "altprop.lm.config.Parser"


@dataclass(frozen=True)
class Run:
    estimator: ap.AbstractEstimator = field(default_factory=ap.AEP)


@pytest.mark.parametrize("name", sorted(choices(ap.AbstractEstimator)))
def test_every_public_estimator_reads_back_by_either_name(name: str, tmp_path: Path) -> None:
    run = Run(getattr(ap, name)())
    write_config(tmp_path / "run.yaml", run)
    assert read_config(tmp_path / "run.yaml", Run) == run
    assert parsed(Run, {"estimator": {"class_path": name}}) == run
    assert parsed(Run, {"estimator": f"altprop.{name}"}) == run


@pytest.mark.parametrize("name", sorted(choices(ap.AbstractEstimator)))
def test_the_types_of_every_field_of_every_public_estimator_are_checked(name: str) -> None:
    for field_name in vars(getattr(ap, name)()):
        spec = {"class_path": name, "init_args": {field_name: {"x": 1}}}
        # what holds a part of its own, such as a solver, asks for that part's class instead
        said = f"estimator.{field_name}: expected (.*, got |a class to be named first)"
        with pytest.raises(ConfigError, match=said):
            parsed(Run, {"estimator": spec})


def test_only_public_classes_have_short_names() -> None:
    assert sorted(choices(AbstractShape)) == ["Circle", "Square"]
    assert set(choices(ap.AbstractEstimator)) <= set(ap.__all__)
    assert "AbstractEstimator" not in choices(ap.AbstractEstimator)


def test_a_value_without_a_plain_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot hold .*complex"):
        config_dict(replace(Config(), text=1j))  # type: ignore[arg-type]


def test_naming_a_class_takes_over_nothing_from_the_class_before() -> None:
    # Both have a radius; Circle's 2.0 must not leak into Square, nor into a Circle named afresh.
    square = {"class_path": "Square", "init_args": {"side": 1}}
    assert parsed(Config, {"shape": square}).shape == Square(1.0, 7.0)
    assert parsed(Config, {"shape": "Circle"}).shape == Circle(1.0)
    assert parsed(Config, {"shape": square}, {"shape": "Circle"}).shape == Circle()
    assert parsed(Config, {"shape": {"inner": square}}).shape == Circle(2.0, Square(1.0, 7.0))
    assert parsed(Config, {"places": {"a": square}}, {"places": {"a": "Circle"}}).places == {
        "a": Circle()
    }


def test_fields_alone_change_the_class_that_stands_there() -> None:
    assert parsed(Config, {"shape": {"inner": "Circle"}}).shape == Circle(2.0, Circle())
    assert parsed(Config, {"spare": {"init_args": {"radius": 1}}}).spare == Square(3.0, 1.0)
    assert parsed(Config, {"size": {"height": 9}}).size == Size(3, 9)


def test_a_mapping_or_list_replaces_the_one_before() -> None:
    assert parsed(Config, {"places": {"a": "Circle"}}, {"places": {"b": "Circle"}}).places == {
        "b": Circle()
    }
    assert parsed(Config, {"shapes": []}).shapes == ()
    assert parsed(Config, {"rule": {"a.*": "Circle"}}).rule == {"a.*": Circle()}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"stepz": 1}, "unknown option --stepz: did you mean --steps"),
    ({"steps": 1.5}, "--steps: expected a whole number, got 1.5"),
    ({"steps": True}, "--steps: expected a whole number, got True"),
    ({"steps": None}, "--steps: expected a whole number, got null"),
    ({"text": 5}, "--text: expected text, got 5"),
    ({"mode": "x"}, r"--mode: expected one of \['skip', 'stop'\], got x"),
    ({"colour": "GREEN"}, "--colour: expected one of {RED,BLUE}, got GREEN"),
    (
        {"betas": [1, 2, 3]},
        r"--betas: expected a tuple with 2 elements, got \[1, 2, 3\]",
    ),
    ({"betas": [1, "x"]}, "--betas: expected a number, got x"),
    ({"shape": None}, "--shape: expected one of Circle, Square, got null"),
    ({"shape": 5}, "--shape: expected one of Circle, Square, got 5"),
    ({"shape": "Sqare"}, "unknown class 'Sqare': did you mean Square. Known: Circle, Square"),
    ({"shape": "_Private"}, "unknown class '_Private'"),
    ({"shape": "AbstractShape"}, "unknown class 'AbstractShape'"),
    ({"shape": "test_config.Circl"}, "cannot import 'test_config.Circl'.*did you mean Circle"),
    ({"shape": "test_config.Size"}, "test_config.Size is no dataclass that derives from Abstract"),
    ({"shape": "Square"}, "--shape.side is missing"),
    ({"shape": {"radus": 1}}, "--shape.radus of Circle: did you mean --shape.radius"),
    (
        {"shape": {"class_path": "Circle", "radius": 1}},
        "expected only class_path and a mapping init_args",
    ),
    ({"spare": {"class_path": "Square", "init_args": {"q": 1}}}, "it takes side, radius"),
    ({"rule": {"a.*": "Sqare"}}, r"--rule.a.\*: unknown class 'Sqare': did you mean Square"),
    ({"rule": "Sqare"}, "--rule: unknown class 'Sqare'"),
    ({"places": {1: "Circle"}}, "--places: the name 1 is no text: write '1'"),
    ({"shapes": "Circle"}, "--shapes: expected a list, got Circle"),
]


@pytest.mark.parametrize(("raw", "message"), BAD)
def test_what_does_not_fit_is_named_with_what_would(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parser = Parser()
        parser.add_class_arguments(Config)
        parser.parse_object(raw)
    assert "\n" not in str(caught.value)


FILES = [
    ("steps: [1", "not valid YAML: .* line 1, column 10"),
    ("- 1", r"expected lines such as 'steps: 1000', got '- 1'"),
    ("steps", "expected lines such as 'steps: 1000', got 'steps'"),
    ("shape: {radus: 1}", "run.yaml: unknown option shape.radus of Circle: did you mean shape.rad"),
    ("shape: Square", "run.yaml: shape.side is missing"),
    ("shape.radius: 1", "unknown option shape.radius: in a file radius stands below shape"),
    ("steps: " + "[" * 3000, "run.yaml: not valid YAML: maximum recursion depth"),
    ("steps: x", "run.yaml: steps: expected a whole number, got x"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_a_bad_file_is_named_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "run.yaml", Config)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_config(tmp_path / "run.yaml", Config)


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "run.yaml", Config) == Config()
