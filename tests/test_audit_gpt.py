"""The audit of rules on the transformer: exact where no rule acts, honest about its controls."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import altprop as ap
from altprop.lab.audit_gpt import audit_gpt
from altprop.lab.settings import TrainConfig
from lm_runs import SMALL, sentences


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(sentences())
    return TrainConfig(data=str(text), model="gpt", layers=2, **SMALL)


def test_the_reference_is_backprop_with_the_rules_off(config: TrainConfig, tmp_path: Path) -> None:
    rules = [ap.Backprop(), ap.FeedbackAlignment()]
    audit_gpt(rules, config, tmp_path / "rows.json", None, training=False)
    exact, aligned = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert exact["whole"][0]["cosine"] == pytest.approx(1) and exact["scale_stability"] == [1]
    cosines = {layer: found[0]["cosine"] for layer, found in aligned["layers"].items()}
    assert cosines["head"] == pytest.approx(1)  # nothing above it sends anything
    assert cosines["blocks.0"] < 0.9 and cosines["tokens"] < 0.9


def test_recovery_is_the_share_of_backprops_gain_over_frozen_blocks(
    config: TrainConfig, tmp_path: Path
) -> None:
    rules = [ap.FeedbackAlignment()]
    _, (told,) = audit_gpt(rules, config, tmp_path / "rows.json", None, training=True)
    found = json.loads((tmp_path / "rows.json").read_text())
    frozen, backprop = found["controls"]["frozen"], found["controls"]["backprop"]
    loss = found["rows"][0]["validation_loss"]
    (share,) = re.findall(r"recovery (-?\d+)%", told)
    assert backprop < frozen
    assert int(share) == pytest.approx(100 * (frozen - loss) / (frozen - backprop), abs=0.51)
