"""Layer-parallel direct feedback: stages on processes do what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import altprop as ap
import stages
from altprop.lab.building import build_model
from altprop.lab.checkpoint import load
from altprop.lab.pipeline import check, micro_batches, placed
from altprop.lab.train import train
from lm_runs import curve, small
from stages import CASES, COUNT

Found = list[dict[str, Any]]
CLOSE = 1e-10


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """The runs' folder, and what every process of the one start found."""
    folder = tmp_path_factory.mktemp("stages")
    whole = stages.run(folder / "whole")  # it writes the text before anybody else reads it
    train(whole)
    train(replace(whole, out=folder / "taken", steps=4))  # on which the stages go on
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, stages.__file__]
    processes = [
        subprocess.Popen([*words, str(index), str(folder)], env=around) for index in range(COUNT)
    ]
    try:
        assert [process.wait(timeout=400) for process in processes] == [0] * COUNT
    finally:
        for process in processes:
            process.kill()
    train(replace(whole, out=folder / "staged", resume=True))  # on what the stages have begun
    return folder, [
        torch.load(folder / f"{index}.pt", weights_only=False) for index in range(COUNT)
    ]


@pytest.fixture
def found(ran: tuple[Path, Found]) -> Found:
    return ran[1]


def differ(one: Any, other: Any) -> float:
    """Return the largest difference of two checkpoints' tensors, which have the same names."""
    worst = 0.0
    for group in ("model", "training", "optimiser", "extra"):
        a, b = getattr(one, group), getattr(other, group)
        assert a.keys() == b.keys()
        gaps = [(a[name].double() - b[name].double()).abs().max() for name in a]
        worst = max([worst, *map(float, gaps)])
    return worst


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_in_stages_equal_those_of_one_process(case: str, found: Found) -> None:
    own = found[0][case]
    assert differ(own["found"], own["wanted"]) < CLOSE
    for one, other in zip(own["records"], own["wanted records"], strict=True):
        assert abs(one["gradient_norm"] - other["gradient_norm"]) < CLOSE
        assert abs(one["loss"] - other["loss"]) < 1e-6  # a cross-entropy is of float32


@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_from_stages_and_stages_from_one_process(
    case: str, found: Found
) -> None:
    own = found[0][case]
    assert [record["step"] for record in own["resumed records"]] == [6, 7, 8, 9, 10]
    assert differ(own["resumed"], own["wanted"]) < CLOSE
    assert differ(own["back"], own["wanted"]) < CLOSE


@pytest.mark.parametrize("case", CASES)
def test_every_process_knows_the_loss_and_the_norm_of_the_whole(case: str, found: Found) -> None:
    count = int(case[0])
    for name in ("loss", "gradient_norm"):
        values = [[record[name] for record in one[case]["records"]] for one in found[:count]]
        assert all(each == values[0] for each in values)


@pytest.mark.parametrize("name", ["staged", "taken"])
def test_a_run_begun_by_stages_or_by_one_process_is_ended_by_the_other(
    name: str, ran: tuple[Path, Found]
) -> None:
    folder, _ = ran
    for file in ("last", "best"):
        one, other = (load(folder / each / f"{file}.safetensors") for each in (name, "whole"))
        assert differ(one, other) < 1e-6
        assert one.notes["progress"]["step"] == 8
    one, other = (curve(folder / each) for each in (name, "whole"))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for key in ("validation_loss", "final_validation_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(one, other, strict=True) if key in b]
        assert pairs and all(abs(a - b) < 1e-6 for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_stages_evaluate_and_write_as_one_process_does(case: str, found: Found) -> None:
    for one in found[: int(case[0])]:
        in_stages, alone = one[case]["evaluations"]
        assert abs(in_stages - alone) < 1e-6
        in_stages, alone = one[case]["texts"]
        assert torch.equal(in_stages, alone)


def test_activations_go_to_the_next_stage_and_errors_from_the_last_alone(
    found: Found, tmp_path: Path
) -> None:
    config = small(tmp_path / "run", model="gpt", **CASES["4 block"])
    micro = micro_batches(config, COUNT)
    words = config.batch * config.context * 4 // micro  # bytes of a channel
    for index, one in enumerate(found):
        seen = one["messages"]
        sent = [("sent", index + 1, words * config.d_model)] * micro * (index < COUNT - 1)
        errors = [("broadcast", COUNT - 1, words * 21)] * micro
        assert sorted(seen) == sorted([*sent, *errors, ("broadcast", COUNT - 1, 4)])


def test_the_first_stage_ends_its_backward_pass_before_the_last_one_does(found: Found) -> None:
    assert found[0]["independent"] and found[1]["independent"]


@pytest.mark.parametrize(
    ("layers", "count"), [(4, 4), (5, 4), (7, 2), (12, 5)], ids=lambda n: str(n)
)
def test_every_block_is_in_one_stage_and_stages_are_even(layers: int, count: int) -> None:
    stages = [placed(layers, index, count) for index in range(count)]
    assert [block for stage in stages for block in stage] == list(range(layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": None}, "backprop"),
        ({"rule": ap.SignSymmetry()}, "SignSymmetry"),
        ({"rule": ap.KolenPollack()}, "KolenPollack"),
        ({"rule": ap.BlockDirectFeedback()}, "BlockDirectFeedback"),
        ({"rule": ap.DirectFeedback()}, "granularity='matmul'"),
        ({"rule": ap.DirectFeedback(pass_through="pure")}, "pass_through='pure'"),
        ({"rule": ap.DirectFeedback("block", calibrate_every=2)}, "calibrate_every=2"),
        ({"rule": ap.GrAPE()}, "GrAPE"),
        ({"rule": None, "rules": {"blocks.*": ap.DirectFeedback("block")}}, "rules"),
        ({"layers": 1}, "--layers 2"),
        ({"tie_head": True}, "tie_head"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_cannot_run_in_stages_is_refused_with_what_can(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = {"model": "gpt", "layers": 2, "rule": ap.DirectFeedback("block")}
    config = small(tmp_path / "run", **{**base, **changes})
    with pytest.raises(ap.ConfigError) as error:
        check(config, build_model(config, vocabulary=21), count=2)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
