"""`altprop sample` continues a text with a trained model, or says why it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from altprop import Anderson, CheckpointError, ConfigError, DataError, JacobianHinge
from altprop.lab import checkpoint
from altprop.lab.cli import main
from altprop.lab.sample_command import load_run, sample
from altprop.lab.train import train
from altprop.lm.text import CharTokenizer
from lm_runs import reconfigure, small

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(small(folder, steps=120, eval_every=60, lr=1e-2, stabiliser=JacobianHinge(target=0.3)))
    return folder


def written(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert err == ""
    return out.removesuffix("\n")


def test_a_sample_continues_the_prompt_by_so_many_characters_of_the_vocabulary(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run, prompt="the old ", tokens=60)
    text = written(capsys)
    assert text.startswith("the old ") and len(text) == 68
    assert set(text) <= set(CharTokenizer.from_json(run / "vocab.json").vocab)
    sample(run, tokens=5)
    assert written(capsys)[0] == "\n"
    sample(run, prompt="my", tokens=0)
    assert written(capsys) == "my"


def test_a_model_that_has_learned_writes_the_words_of_its_text(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run, prompt="the ", tokens=200, temperature=0.5)
    words = set(written(capsys).replace(".", " ").split())
    known = "the cat a dog old man my friend king sees likes finds follows".split()
    assert len(words & set(known)) >= 4


def test_the_seed_decides_the_text_and_temperature_zero_needs_none(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in (0, 0, 1):
        sample(run, tokens=40, seed=seed)
        texts.append(written(capsys))
    assert texts[0] == texts[1] != texts[2]
    for seed in (0, 1):
        sample(run, tokens=40, temperature=0, seed=seed)
        texts.append(written(capsys))
    assert texts[3] == texts[4]
    sample(run, tokens=40, top_k=1)
    assert written(capsys) == texts[3]


def test_best_and_last_are_the_two_checkpoints(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    changed, _ = load_run(copied, "best", "cpu")
    torch.nn.init.constant_(changed.head.weight, 0.5)
    notes = checkpoint.load(copied / "best.safetensors").notes
    checkpoint.save(copied / "last.safetensors", changed, None, {}, notes)
    last, best = load_run(copied, "last", "cpu")[0], load_run(copied, "best", "cpu")[0]
    assert bool((last.head.weight == 0.5).all()) and not bool((best.head.weight == 0.5).any())
    (copied / "best.safetensors").unlink()
    load_run(copied, "last", "cpu")
    with pytest.raises(
        CheckpointError, match="best.safetensors: there is no such checkpoint.*t last"
    ):
        load_run(copied, "best", "cpu")
    with pytest.raises(ConfigError, match="unknown checkpoint 'lst': did you mean last"):
        load_run(copied, "lst", "cpu")  # type: ignore[arg-type]


def test_text_with_brackets_and_colons_is_printed_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("[b]:smile: \\[x] œ\n" * 30, encoding="utf-8")
    train(small(tmp_path / "run", steps=1))
    capsys.readouterr()
    sample(tmp_path / "run", prompt="[b]:smile: \\[x] œ", tokens=0)
    assert capsys.readouterr().out == "[b]:smile: \\[x] œ\n"


def test_a_text_that_was_read_from_no_equilibrium_comes_with_a_warning(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    reconfigure(copied, solver=Anderson(max_steps=1, tol=1e-7))
    sample(copied, tokens=7)
    out, err = capsys.readouterr()
    assert len(out) == 9  # the prompt, the tokens and the end of the line
    assert err.startswith("altprop: warning: 7 of 7 tokens were read from a state")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("anarchism originated as a term of abuse " * 50, " "),
        ("GATTACACCGT" * 50, "A"),
        ("a line break comes first\n" * 50, "\n"),
    ],
    ids=["words", "DNA", "lines"],
)
def test_without_a_prompt_the_text_starts_where_its_vocabulary_lets_it(
    text: str, start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    train(small(tmp_path / "run", steps=1))
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--tokens", "7"]) == 0
    first = written(capsys)
    assert first[0] == start and len(first) == 8
    sample(tmp_path / "run", prompt=start, tokens=7)
    assert written(capsys) == first


@pytest.mark.parametrize(
    "option",
    [
        *("tokens=-5", "temperature=-1", "temperature=nan", "temperature=inf", "top_k=0"),
        *(
            "seed=-1",
            "seed=9223372036854775808",
            "which=lst",
            "device=abacus",
            "prompt=",
            "prompt=Z",
        ),
        *("tokens=many", "top_k=few", "prompts=x"),
    ],
)
def test_no_option_is_refused_after_the_prompt_was_printed(
    option: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run), f"--{option}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("altprop: error: ") and err.count("\n") == 1


def test_a_run_that_is_named_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["a", "--run", "b"], ["--run=b", "a"]):
        assert main(["sample", *words]) == 2
        assert "RUN is given twice, by its place and as --run: give it once" in (
            capsys.readouterr().err
        )


def test_a_temperature_near_zero_takes_the_likeliest(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for temperature in (0, 1e-6, 1e-40, 5e-324):
        sample(run, tokens=20, temperature=temperature)
        texts.append(written(capsys))
    assert len(set(texts)) == 1


def test_what_cannot_be_continued_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match=r"lacks 'Z', 'é'"):
        sample(run, prompt="Zé the")
    with pytest.raises(ConfigError, match="seed is -1"):
        sample(run, seed=-1)
    with pytest.raises(ConfigError, match="device 'abacus'"):
        sample(run, device="abacus")


@pytest.mark.parametrize("name", ["config.yaml", "vocab.json"])
def test_a_folder_that_is_no_run_is_refused_by_what_it_lacks(
    name: str, run: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"no {name}.* there"):
        sample(copied)


def test_a_vocabulary_of_another_size_does_not_fit_the_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    CharTokenizer.from_text("abc").to_json(copied / "vocab.json")
    with pytest.raises(CheckpointError, match="with other values of vocab.json than"):
        sample(copied, prompt="a")
