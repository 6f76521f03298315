"""Every rule trains the application's GPT by the same loop, from the same command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import altprop as ap
from altprop.lab.building import build_model
from altprop.lab.cli import main
from altprop.lab.config import read_config
from altprop.lab.run import Run
from altprop.lab.settings import TrainConfig
from altprop.lab.state import State
from altprop.lab.train import train

RULES = {
    "FeedbackAlignment": ap.FeedbackAlignment(),
    "SignSymmetry": ap.SignSymmetry(),
    "KolenPollack": ap.KolenPollack(),
    "WeightMirror": ap.WeightMirror(),
    "AlignedFeedback": ap.AlignedFeedback(),
    "matmul": ap.DirectFeedback(),
    "sublayer": ap.DirectFeedback(granularity="sublayer"),
    "block": ap.DirectFeedback(granularity="block"),
    "BlockDirectFeedback": ap.BlockDirectFeedback(),
    "GrAPE": ap.GrAPE(calibrate_every=3),
}
SMALL = ["--model", "gpt", "--layers", "2", "--d_model", "16", "--heads", "2", "--context", "16"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    return path


def config(text: Path, out: Path, **changes: object) -> TrainConfig:
    small = dict(
        data=str(text), out=out, model="gpt", layers=2, d_model=16, heads=2, context=16, batch=4,
        steps=20, warmup=2, eval_every=20, eval_windows=8, sample=0,
    )  # fmt: skip
    return TrainConfig(**{**small, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_trains_the_gpt_and_its_run_reads_back(
    name: str, text: Path, tmp_path: Path
) -> None:
    given = config(text, tmp_path / "run", rule=RULES[name])
    result = train(given)
    assert result.loss < 3.3  # ln 28 = 3.33 at the start
    assert read_config(tmp_path / "run" / "config.yaml", TrainConfig) == given


def test_a_resumed_run_by_a_learned_feedback_equals_an_uninterrupted_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = ap.KolenPollack()
    whole = train(config(text, tmp_path / "whole", rule=rule, eval_every=10))
    save = Run.save

    def save_and_stop(self: Run, name: str, state: State, *, resumable: bool) -> None:
        save(self, name, state, resumable=resumable)
        if name == "last":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "save", save_and_stop)
        train(config(text, tmp_path / "part", rule=rule, eval_every=10))
    again = train(config(text, tmp_path / "part", rule=rule, eval_every=10, resume=True))
    assert again.loss == whole.loss


def test_rules_by_pattern_come_from_the_yaml_file(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "rules:\n"
        "  blocks.*.attn.*: SignSymmetry\n"
        "  blocks.*.mlp.*: FeedbackAlignment(init='orthogonal')\n"
    )
    words = ["explain", "--config", str(file), "--data", str(text), *SMALL]
    assert main(words) == 0
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "SignSymmetry" in table["blocks.0.attn.q_proj.weight"]
    assert "FeedbackAlignment" in table["blocks.1.mlp.up_proj.weight"]
    assert "exact" in table["head.weight"]


def test_the_default_model_is_explained_and_a_gpt_without_a_rule_has_nothing_to_explain(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "--data", str(text), *SMALL[4:]]
    assert main(words) == 0
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "AEP" in table["block.dynamics.attention.W_Q"]
    assert "exact" in table["head.weight"]
    assert main([*words, "--model", "gpt"]) == 2
    assert "nothing to explain: no rule was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model", "gpt", "--estimator", "EP"], "model gpt has no estimator"),
        (["--model", "gpt", "--stabiliser.target", "0.5"], "model gpt has no stabiliser"),
        (["--rule", "SignSymmetry"], "model equilibrium has no rule"),
        (["--model", "gtp"], "did you mean gpt?"),
        ([*SMALL, "--rule", "SignSymetry"], "did you mean SignSymmetry?"),
        ([*SMALL, "--rule", "AEP"], "AEP"),
        ([*SMALL, "--freeze", "block.*"], "no parameter is named 'block.*'"),
        ([*SMALL, "--layers", "0"], "layers is 0"),
    ],
)
def test_a_rule_that_does_not_fit_is_one_line_and_leaves_nothing(
    words: list[str], part: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(text), "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1 and error.startswith("altprop: error: ")
    assert not out.exists()


def test_frozen_parameters_stay_as_they_were(text: Path, tmp_path: Path) -> None:
    given = config(text, tmp_path / "run", freeze=("blocks.*",))
    torch.manual_seed(0)
    before = build_model(given, 28)
    assert not any(p.requires_grad for n, p in before.named_parameters() if "blocks" in n)
    assert before.head.weight.requires_grad
    assert train(given).loss < 3.3
