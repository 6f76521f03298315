"""The audit of rules on the transformer: exact where no rule acts, honest about its controls."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import altprop as ap
from altprop.lab.audit_gpt import audit_gpt
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from lm_runs import SMALL, sentences


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(sentences())
    return TrainConfig(data=str(text), model="gpt", layers=2, **SMALL)


def test_the_reference_is_backprop_with_the_rules_off(config: TrainConfig) -> None:
    report, _ = audit_gpt([ap.Backprop(), ap.FeedbackAlignment()], config, training=False)
    exact, aligned = report.rows
    found = report.as_dict()["rules"]
    assert exact.whole.figures["cosine"].mean == pytest.approx(1)
    assert found["Backprop"]["scale_stability"] == [1] != found["FeedbackAlignment"]
    cosines = {layer: a.figures["cosine"].mean for layer, a in aligned.parameters.items()}
    assert cosines["head"] == pytest.approx(1)  # nothing above it sends anything
    assert cosines["blocks.0"] < 0.9 and cosines["tokens"] < 0.9


def test_recovery_is_the_share_of_backprops_gain_over_frozen_blocks(config: TrainConfig) -> None:
    report, (told,) = audit_gpt([ap.FeedbackAlignment()], config, training=True)
    found = report.as_dict()
    frozen, backprop = found["controls"]["frozen"], found["controls"]["backprop"]
    loss = found["rules"]["FeedbackAlignment"]["validation_loss"]
    (share,) = re.findall(r"recovery (-?\d+)%", told)
    assert backprop < frozen
    assert int(share) == pytest.approx(100 * (frozen - loss) / (frozen - backprop), abs=0.51)


def test_a_rule_that_diverges_is_measured_where_it_is_and_its_refused_steps_are_told(
    config: TrainConfig,
) -> None:
    wild = replace(config, lr=1e30, warmup=0)
    report, (told,) = audit_gpt([ap.FeedbackAlignment()], wild, training=True)
    assert told.endswith("; 7 steps were refused")
    assert report.as_dict()["rules"]["FeedbackAlignment"]["refused"] == 7
    assert json.loads(report.to_json())["rules"]["FeedbackAlignment"]["validation_loss"] is None


@pytest.mark.usefixtures("no_curves")
def test_a_rule_is_audited_at_the_weights_that_the_same_run_of_training_reaches(
    config: TrainConfig, tmp_path: Path
) -> None:
    run = replace(config, rule=ap.SignSymmetry(), out=tmp_path / "run", dropout=0.1)
    report, _ = audit_gpt([ap.SignSymmetry()], run, training=True)
    assert report.as_dict()["rules"]["SignSymmetry"]["validation_loss"] == train(run).loss
