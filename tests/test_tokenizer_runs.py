"""A run on subwords: its tokenizer is part of what it is, and lies in its folder."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from altprop.errors import CheckpointError, DataError
from altprop.lab.cli import main
from altprop.lab.reporting.run_facts import run_facts
from altprop.lab.sample_command import load_run
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from altprop.lm.text import IdTokenizer, SubwordTokenizer, load_corpus, train_bpe
from lm_runs import assert_equal_bits, curve, sentences, small, tensors, tree

pytest.importorskip("tokenizers", reason="tokenizers of subwords need the extra hf")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run on it of a BPE, of 8 steps."""
    folder = tmp_path_factory.mktemp("subwords")
    train(settings(folder))
    return folder


def settings(folder: Path, **changes: object) -> TrainConfig:
    # the rate of a step depends on how many there will be after the warm-up alone
    given = {"tokenizer": "bpe:300", "model": "gpt", "layers": 1, "sample": 9, "warmup": 8}
    return replace(small(folder / "run"), **{**given, **changes})


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home, tmp_path / "copied")


def test_a_run_learns_tokens_and_writes_text(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "run"
    assert not (run / "vocab.json").exists()
    kept = SubwordTokenizer.from_json(run / "tokenizer.json")
    assert kept == load_corpus(home / "text.txt", tokenizer="bpe:300").tokenizer
    model, tokenizer = load_run(run, device="cpu")
    assert tokenizer == kept and model.config.vocabulary == len(kept) == 300
    assert abs(curve(run)[0]["loss"] - math.log(300)) < 0.2
    assert main(["sample", str(run), "--prompt", "the king ", "--tokens", "9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the king ") and len(kept.encode(out[:-1])) <= len(out)
    assert run_facts(run, sample=5).sample


def test_a_resumed_run_is_one_that_never_stopped(home: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(sentences(), encoding="utf-8")
    train(settings(tmp_path, steps=4))
    train(settings(tmp_path, resume=True, steps=8))
    kept = [folder / "run" / "tokenizer.json" for folder in (home, tmp_path)]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    assert_equal_bits(tensors(home / "run"), tensors(tmp_path / "run"))


def test_resume_refuses_another_tokenizer(copied: Path) -> None:
    before = tree(copied)
    for other in ("bpe:299", "char"):
        with pytest.raises(CheckpointError, match="other values of (data, )?tokenizer: write"):
            train(settings(copied, resume=True, tokenizer=other))
    assert tree(copied) == before
    # the kept one is what a resumed run reads by: another is noticed, and none is learned again
    train_bpe(sentences(50), 300).to_json(copied / "run" / "tokenizer.json")
    with pytest.raises(CheckpointError, match="other values of data"):
        train(settings(copied, resume=True))
    (copied / "run" / "tokenizer.json").unlink()
    train(settings(copied, resume=True, steps=9))
    assert (copied / "run" / "tokenizer.json").read_bytes() == before["run/tokenizer.json"]


def test_a_checkpoint_beside_another_tokenizer_is_not_read(copied: Path) -> None:
    train_bpe(sentences(50), 300).to_json(copied / "run" / "tokenizer.json")
    with pytest.raises(CheckpointError, match="other values of tokenizer.json than its folder"):
        load_run(copied / "run", device="cpu")


def test_a_tokenizers_file_may_move_and_a_run_needs_it_no_more(copied: Path) -> None:
    train_bpe(sentences(), 280).to_json(copied / "mine.json")
    run = settings(copied, tokenizer=str(copied / "mine.json"), overwrite=True)
    train(run)
    (copied / "mine.json").rename(copied / "moved.json")
    again = replace(run, overwrite=False, resume=True, steps=9)
    train(again)
    train(replace(again, tokenizer=str(copied / "moved.json"), steps=10))
    train_bpe(sentences(), 281).to_json(copied / "moved.json")
    with pytest.raises(CheckpointError, match="another vocabulary"):
        train(replace(again, tokenizer=str(copied / "moved.json"), steps=11))


def test_overwriting_leaves_one_tokenizer(copied: Path) -> None:
    train(settings(copied, tokenizer="char", overwrite=True))
    assert (copied / "run" / "vocab.json").exists()
    assert not (copied / "run" / "tokenizer.json").exists()


def test_a_run_on_tokens_alone_writes_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.arange(400).remainder(7).to(torch.int16).numpy()
    (tmp_path / "n").mkdir()
    for name in ("train.bin", "val.bin"):
        ids.tofile(tmp_path / "n" / name)
    train(settings(tmp_path, data=str(tmp_path / "n"), tokenizer="ids:7"))
    assert load_run(tmp_path / "run")[1] == IdTokenizer(7)
    train(settings(tmp_path, data=str(tmp_path / "n"), tokenizer="ids:7", resume=True, steps=9))
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--prompt", "1 2 3", "--tokens", "4"]) == 0
    written = capsys.readouterr().out.split()
    assert written[:3] == ["1", "2", "3"] and len(written) == 7
    with pytest.raises(DataError, match="holds the id 6"):
        train(settings(tmp_path, data=str(tmp_path / "n"), tokenizer="ids:6", overwrite=True))


# A run and its text, moved


def resumed(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    words = ["train", "--config", str(folder / "config.yaml"), "--resume", "--steps", "9", *more]
    status = main(words)
    return "" if status == 0 else capsys.readouterr().err


@pytest.mark.parametrize("run", ["run", "runs/deep/run"])
def test_a_run_that_moves_with_its_texts_finds_them(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    old.mkdir()
    new.parent.mkdir()
    (old / "held.txt").write_text(sentences(50), encoding="utf-8")
    train(settings(old, out=old / run, validation=str(old / "held.txt")))
    shutil.copytree(old, tmp_path / "kept")
    old.rename(new)
    assert resumed(new / run, capsys) == ""
    assert str(new / "text.txt") in (new / run / "config.yaml").read_text()
    # what lies there now is another text: it is not taken for the old one
    other = tmp_path / "kept" / "text.txt"
    other.write_text(sentences()[::-1], encoding="utf-8")
    assert "with other values of data" in resumed(tmp_path / "kept" / run, capsys)
    other.unlink()
    assert "no file or folder" in resumed(tmp_path / "kept" / run, capsys)


def test_a_configuration_alone_has_no_run_to_look_from(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (home / "run" / "config.yaml").read_text()
    (tmp_path / "text.txt").write_text(sentences(), encoding="utf-8")
    (tmp_path / "a").mkdir()
    gone = text.replace(str(home), "/nowhere")
    (tmp_path / "a" / "mine.yaml").write_text(gone)
    assert main(["train", "--config", str(tmp_path / "a" / "mine.yaml")]) == 2
    assert "no file or folder '/nowhere/text.txt'" in capsys.readouterr().err
