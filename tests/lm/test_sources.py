"""Texts as people have them: splits that are stated, files of any ending, datasets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from altprop.errors import DataError
from altprop.lm.text import Corpus, absolute, load_corpus


def texts(corpus: Corpus) -> tuple[str, str]:
    return corpus.tokenizer.decode(corpus.train), corpus.tokenizer.decode(corpus.validation)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b.rst", "c.txt", "src/d.py", "src/.e.py", ".git/f.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"{name}\n")
    Path("held.txt").write_text("held out\n")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (("*.py",), "a.py\nsrc/d.py\n"),
        (("*.rst", "src/*"), "b.rst\nsrc/d.py\n"),
        (("a*", "*.py"), "a.py\nsrc/d.py\n"),
        ((), "c.txt\nheld out\n"),
    ],
)
def test_a_pattern_says_which_files_of_a_folder_are_texts(
    pattern: tuple[str, ...], found: str, folder: Path
) -> None:
    assert "".join(texts(load_corpus(folder, pattern=pattern))) == found


def test_a_stated_split_is_taken_whole(folder: Path) -> None:
    assert texts(load_corpus("c.txt", validation="held.txt")) == ("c.txt\n", "held out\n")
    both = load_corpus(".", validation="src", pattern=["*.py"])
    assert texts(both) == ("a.py\nsrc/d.py\n", "src/d.py\n")
    assert "validated on 1 text files under src" in both.description


def test_splits_and_patterns_that_would_do_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"pattern \*\.py says which files of a folder: give one"):
        load_corpus("c.txt", pattern=["*.py"])
    with pytest.raises(DataError, match=r"expected files that end in \*\.c \(--pattern"):
        load_corpus(".", pattern=["*.c"])
    Path("empty").touch()
    for data, held in (("c.txt", "empty"), ("empty", "c.txt")):
        with pytest.raises(DataError, match="empty holds no text"):
            load_corpus(data, validation=held)
    with pytest.raises(DataError, match="no file or folder 'no.txt'"):
        load_corpus("c.txt", validation="no.txt")


# Hugging Face datasets, from local files alone


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with its cache in a folder of this test and no way to the network."""
    datasets = pytest.importorskip("datasets", reason="datasets need the extra hf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load.config.HF_HUB_OFFLINE", True)
    return datasets


def rows(path: Path, column: str, values: list[str | None], **more: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps({"id": n, column: value, **more}) for n, value in enumerate(values))
    path.write_text("\n".join(lines) + "\n")


def test_a_dataset_is_read_by_its_splits_and_its_column_of_text(hub: Any, tmp_path: Path) -> None:
    rows(Path("d/train.jsonl"), "text", ["one", "two\n", None, "", "three"])
    rows(Path("d/validation.jsonl"), "text", ["held"])
    expected = ("one\ntwo\nthree\n", "held\n")
    assert texts(load_corpus("hf:d")) == expected
    assert texts(load_corpus(f"hf:{tmp_path}/d::text")) == expected
    assert texts(load_corpus("hf:d:default:text")) == expected
    Path("own.txt").write_text("own")
    assert texts(load_corpus("hf:d", validation="own.txt")) == (expected[0], "own")
    assert texts(load_corpus("own.txt", validation="hf:d")) == ("own", "held\n")
    hub.load_dataset("d").save_to_disk("saved")
    assert texts(load_corpus("hf:saved")) == expected
    rows(Path("one.jsonl"), "story", ["0123456789"] * 2)  # one file, a split of nobody's
    assert texts(load_corpus("hf:one.jsonl")) == ("0123456789\n01234567", "89\n")


def test_a_dataset_that_cannot_be_read_is_refused_in_one_line(hub: Any) -> None:
    rows(Path("two.jsonl"), "title", ["a"], body="b")
    rows(Path("none.jsonl"), "number", [1])  # type: ignore[list-item]
    Path("bad.jsonl").write_text("{")
    for spec, said in {
        "hf:two.jsonl": r"2 columns of text \(title, body\): name one, as in hf:NAME::title",
        "hf:two.jsonl::bodi": "no column 'bodi': did you mean body",
        "hf:none.jsonl": "0 columns of text",
        "hf:none.jsonl::number": "holds int, not text",
        "hf:bad.jsonl": "cannot read the dataset",
        "hf:nobody/nothing": "cannot read the dataset 'hf:nobody/nothing'",
        "hf:": "expected hf:NAME",
        "hf:a:b:c:d": "expected hf:NAME",
    }.items():
        with pytest.raises(DataError, match=said) as error:
            load_corpus(spec)
        assert "\n" not in str(error.value)


def test_a_dataset_with_code_of_its_own_runs_none(hub: Any, tmp_path: Path) -> None:
    Path("evil").mkdir()
    Path("evil/evil.py").write_text("open('ran', 'w')\n")
    with pytest.raises(DataError, match="cannot read the dataset"):
        load_corpus("hf:evil")
    assert not (tmp_path / "ran").exists()


def test_a_dataset_means_the_same_from_every_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    assert absolute("hf:d") == f"hf:{tmp_path}/d" == absolute(absolute("hf:d"))
    assert absolute("hf:d::text") == f"hf:{tmp_path}/d::text"
    assert absolute("hf:user/name:config") == "hf:user/name:config"
    assert absolute("plays") == "plays" and absolute("d") == f"{tmp_path}/d"


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'package datasets: pip install "altprop\[hf\]"'):
        load_corpus("hf:anything")
