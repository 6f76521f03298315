"""Bad input meets one clear line, exit status 2, and nothing new on disk."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from altprop.lab.cli import main
from altprop.lab.config import read_config, to_yaml
from altprop.lab.identity import options_of
from altprop.lab.seal import sealed
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from lm_runs import small, tree, words

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a text, `text.txt`, and of a run on it, `run`."""
    folder = tmp_path_factory.mktemp("trained")
    train(small(folder / "run", steps=2))
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: it holds a text and a run."""
    copied = shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(copied)
    return copied


Refused = Callable[..., str]


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run the command line and return the one line with which it refuses."""

    def call(*argv: str) -> str:
        before = tree(here)
        capsys.readouterr()
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("altprop: error: ") and err.count("\n") == 1 and err[-1] == "\n"
        assert "Traceback" not in err
        assert tree(here) == before
        return err

    return call


def tiny(here: Path, **changes: object) -> list[str]:
    """Return the words of a good tiny run, but for these options."""
    options = dict(zip(*[iter(words(small(here / "new")))] * 2, strict=True))
    options |= {f"--{name}": str(value) for name, value in changes.items()}
    return ["train", *(word for pair in options.items() for word in pair)]


def test_without_a_fault_the_same_words_train(here: Path) -> None:
    assert main(tiny(here)) == 0
    assert (here / "new" / "last.safetensors").exists()


# The text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"too short. " * 3, "holds 4 tokens, but a context of 16 needs 17: give more text or a"),
        ("caf\xe9 ".encode("latin-1") * 200, "is not UTF-8: byte 0xe9 at offset 3"),
    ],
    ids=["too short", "Latin-1"],
)
def test_a_text_that_cannot_be_trained_on(
    content: bytes, said: str, here: Path, refused: Refused
) -> None:
    (here / "bad.txt").write_bytes(content)
    line = refused(*tiny(here, data="bad.txt"))
    assert "bad.txt" in line and said in line


class Hostile:
    """What a pickle of somebody else may do when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        (lambda mark: pickle.dumps({"itos": {0: "a"}, "evil": Hostile(mark)}), "it names "),
        (lambda mark: pickle.dumps({"itos": {0: "a", 1: 7}}), "meta.pkl"),
        (lambda mark: pickle.dumps({"vocab": 3})[:-4], "meta.pkl"),
        (lambda mark: b"not a pickle", "meta.pkl"),
    ],
    ids=["hostile", "no vocabulary", "truncated", "no pickle"],
)
@pytest.mark.parametrize("command", ["train", "data"])
def test_a_meta_pkl_that_is_hostile_or_broken(
    command: str, meta: Callable[[Path], bytes], said: str, here: Path, refused: Refused
) -> None:
    folder, mark = here / "prepared", here / "hostile-was-here"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        np.zeros(100, dtype="<u2").tofile(folder / name)
    (folder / "meta.pkl").write_bytes(meta(mark))
    argv = tiny(here, data="prepared") if command == "train" else ["data", "prepared"]
    line = refused(*argv)
    assert "meta.pkl" in line and said in line
    assert not mark.exists()


# The folder of the run


@pytest.mark.parametrize("out", ["text.txt", "text.txt/run", "text.txt/a/b"])
def test_an_output_folder_that_cannot_be_one(out: str, here: Path, refused: Refused) -> None:
    assert "text.txt" in refused(*tiny(here, out=out))


def test_an_output_folder_whose_name_no_checkpoint_can_have(here: Path, refused: Refused) -> None:
    assert "out is 'a\\udcff', which is not UTF-8: name another" in refused(
        *tiny(here, out="a\udcff")
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_the_right_to_write(here: Path, refused: Refused) -> None:
    (here / "locked").mkdir(mode=0o500)
    assert "locked" in refused(*tiny(here, out="locked/run"))


# Options


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("solver", "Andersen", "'Andersen': did you mean Anderson?"),
        ("block", "gatd", "unknown block 'gatd': did you mean gated?"),
        ("on_failure", "skp", "--on_failure: expected one of"),
        ("stepz", "3", "unknown option --stepz: did you mean --steps?"),
        ("solver.toll", "0.1", "did you mean --solver.tol?"),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest_known_one(
    option: str, value: str, said: str, here: Path, refused: Refused
) -> None:
    assert said in refused(*tiny(here), f"--{option}", value)


@pytest.mark.parametrize("beta", ["0", "-0.1"])
@pytest.mark.parametrize("estimator", ["AEP", "EP", "PublishedAEP"])
def test_a_nudge_that_is_not_positive(
    estimator: str, beta: str, here: Path, refused: Refused
) -> None:
    line = refused(*tiny(here, estimator=estimator), "--estimator.beta", beta)
    assert "beta is -0.1" in line or "beta is 0" in line
    assert "expected a number > 0" in line


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("heads", 3, "heads must divide d_model, for example heads=4"),
        ("heads", 0, "heads is 0, expected at least 1"),
        ("steps", 1.5, "--steps: expected a whole number, got"),
        ("context", 100000, "give more text or a shorter context"),
        ("device", "meta", "device 'meta' cannot be used here"),
        ("data", "", "no file or folder '': give the name of a corpus"),
        ("freeze", '["*"]', "freeze: '*' leaves no parameter to learn"),
        ("solver", "Anderson(memory=0)", "memory is 0"),
        (
            "solver",
            "Anderson(memory='five')",
            "--solver.memory: expected a whole number, got 'five'",
        ),
    ],
)
def test_a_value_that_no_run_can_have(
    option: str, value: object, said: str, here: Path, refused: Refused
) -> None:
    assert said in refused(*tiny(here, **{option: value}))


# Writing text


def test_a_prompt_outside_the_vocabulary_names_the_characters(here: Path, refused: Refused) -> None:
    line = refused("sample", "run", "--prompt", "Ünd the €")
    assert "lacks 'U', '€'" not in line and "'Ü'" in line and "'€'" in line and "'t'" not in line
    assert "the prompt is empty" in refused("sample", "run", "--prompt", "")
    assert "'\\\\'" in refused("sample", "run", "--prompt", "the\\n")


@pytest.mark.parametrize("command", ["sample", "resume"])
@pytest.mark.parametrize("fault", ["truncated", "foreign", "text", "missing", "other shapes"])
def test_a_checkpoint_with_a_fault(fault: str, command: str, here: Path, refused: Refused) -> None:
    which = "best" if command == "sample" else "last"
    path = here / "run" / f"{which}.safetensors"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "foreign":
        save_file({"wte.weight": torch.zeros(3, 3)}, path, {"format": "pt"})
    elif fault == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif fault == "missing":
        path.unlink()
    else:
        config = replace(read_config(here / "run" / "config.yaml", TrainConfig), d_model=32)
        (here / "run" / "config.yaml").write_bytes(sealed(to_yaml(options_of(config))))
    if command == "sample":
        line = refused("sample", "run")
    else:
        line = refused("train", "--config", "run/config.yaml", "--out", "run", "--resume")
    said = (str(Path("run", path.name)), "no checkpoint yet", "with other values of d_model")
    assert any(part in line for part in said)


def test_a_vocabulary_with_a_fault(here: Path, refused: Refused) -> None:
    (here / "run" / "vocab.json").write_text("{")
    assert "run/vocab.json" in refused("sample", "run")


# A process
