"""Many processes, and many passes, make the steps of one; what they cannot do is one line."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import altprop as ap
from altprop.lab.cli import main
from altprop.lab.ranks import Ranks, own_device
from altprop.lab.reporting.metrics import read_metrics
from altprop.lab.train import train
from lm_runs import small, steps, tensors, words
from ranks import CASES, apart, ended, learned, start, together, until

pytestmark = pytest.mark.usefixtures("no_curves")

Outcomes = dict[str, dict[str, Tensor]]
NAMED = ("AEP", "AEP, separate", "Implicit", "FA", "sign symmetry", "Kolen-Pollack", "DFA", "GrAPE")
# (benchmarks/processes.py makes all of them; the first two of a kind see all that is special to it)
TWO = [f"ddp:1:{name}" for name in NAMED] + [f"fsdp:2:{name}" for name in (*NAMED, "average")]
FOUR = ["ddp:2:AEP", "fsdp:1:AEP", "ddp:2:GrAPE", "fsdp:1:GrAPE"]


@pytest.fixture(scope="module")
def one() -> Callable[[str], dict[str, Tensor]]:
    """What one process learns in one pass a step."""
    known: Outcomes = {}

    def of(name: str) -> dict[str, Tensor]:
        if name not in known:
            known[name] = learned(name, Ranks())
        return known[name]

    return of


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    folder = tmp_path_factory.mktemp("ranks")
    return {2: together(2, TWO, folder), 4: together(4, FOUR, folder)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    differ = apart(wanted, found)
    assert any("loss" in name for name in differ)
    assert {name: by for name, by in differ.items() if by > 1e-5} == {}


@pytest.mark.parametrize("name", CASES)
def test_passes_over_parts_of_a_batch_make_its_steps(
    name: str, one: Callable[[str], dict[str, Tensor]]
) -> None:
    assert_same(learned(name, Ranks(), accumulate=4), one(name))


@pytest.mark.parametrize(
    ("count", "case"), [*((2, case) for case in TWO), *((4, case) for case in FOUR)]
)
def test_processes_make_the_steps_of_one(
    count: int,
    case: str,
    many: dict[int, Outcomes],
    one: Callable[[str], dict[str, Tensor]],
) -> None:
    assert_same(many[count][case], one(case.split(":")[2]))


def test_what_is_compared_is_no_trifle(one: Callable[[str], dict[str, Tensor]]) -> None:
    for name in ("AEP", "AEP, separate", "OneStep, gate hinge", "Implicit"):  # the hinges push
        assert one(name)["jacobian_gain 0"] > 0.02, name
        resting = learned(name, Ranks(), stabiliser=None)
        assert any((one(name)[k] - t).abs().max() > 1e-4 for k, t in resting.items()), name
    for name in ("Kolen-Pollack", "GrAPE"):  # and feedback learns, from where it was drawn
        drawn = learned(name, Ranks(), lr=1e-12)
        others = [k for k in drawn if not k.endswith(("weight", "bias")) and " " not in k]
        feedback = [k for k in others if drawn[k].is_floating_point()]
        assert feedback and all((drawn[k] - one(name)[k]).norm() > 1e-4 for k in feedback), name
    assert max(apart(one("backprop"), one("dropout")).values()) > 1e-2


def test_a_run_that_lost_a_process_goes_on_with_two_four_and_one(tmp_path: Path) -> None:
    config = small(tmp_path / "run", steps=60, save_every=0.0, eval_every=60, accumulate=1)
    alone = train(small(tmp_path / "alone", steps=60, eval_every=60)).folder
    command = ["-m", "altprop", "train", *words(config, "save_every")]

    two = start(2, *command)
    until(config.out / "metrics.jsonl", 5, two)
    two[1].send_signal(signal.SIGKILL)
    since = time.monotonic()
    (status, _, said), _ = ended(two)
    assert time.monotonic() - since < 60
    assert status == 2 and said.count("\n") == 1
    assert "another of the 2 processes has ended or does not answer" in said
    lost = len(steps(config.out))
    assert lost < 60

    four = start(4, *command, "--resume", "true", "--parallel", "fsdp")
    until(config.out / "metrics.jsonl", lost + 3, four)
    four[2].send_signal(signal.SIGTERM)
    found = ended(four)
    assert [status for status, *_ in found] == [143] * 4, found
    assert "go on with" in found[0][1] and [out for _, out, _ in found[1:]] == [""] * 3
    assert len(steps(config.out)) < 60

    assert main(["train", *words(config, "save_every"), "--resume"]) == 0
    assert [record["step"] for record in steps(config.out)] == list(range(1, 61))
    there, here = tensors(alone), tensors(config.out)
    weights = [name for name in there if name.startswith(("model", "optimiser"))]
    differ = apart({n: there[n] for n in weights}, {n: here[n] for n in weights})
    assert max(differ.values()) < 1e-3, differ
    losses = [[record["loss"] for record in steps(folder)] for folder in (alone, config.out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "validation_loss" in read_metrics(config.out)[-2]


@pytest.mark.parametrize(
    ("around", "options", "line"),
    [
        ({"WORLD_SIZE": "two"}, [], "WORLD_SIZE is 'two', expected a number"),
        ({"WORLD_SIZE": "2"}, [], "WORLD_SIZE is 2, without RANK, MASTER_ADDR, MASTER_PORT: start"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"},
            [],
            "no group of 2 processes",
        ),
        ({}, ["--parallel", "fsdp"], "parallel is fsdp, and there is one process"),
        ({}, ["--parallel", "both"], "parallel"),
        ({}, ["--accumulate", "3"], "batch is 4, which 3 passes cannot share alike"),
        ({}, ["--accumulate", "0"], "accumulate is 0, expected at least 1"),
        ({}, ["--threads", "0"], "threads is 0, expected at least 1"),
        ({}, ["--checkpointing"], "model equilibrium has no checkpointing"),
        (
            {},
            ["--accumulate", "2", "--stabiliser", "JacobianHinge(per='batch')"],
            "looks at a batch as a whole",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    around: dict[str, str],
    options: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("altprop.lab.ranks.PATIENCE", timedelta(seconds=1))
    for name, value in around.items():
        monkeypatch.setenv(name, "29411" if value == "free" else value)
    assert main(["train", *words(small(tmp_path / "run")), *options]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


def test_a_command_of_one_process_is_not_made_by_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["audit"]) == 2
    assert "audit is for one process" in capsys.readouterr().err


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    config: Any = small(Path("none"), batch=12, accumulate=2)
    config.check_ranks(6)
    with pytest.raises(ap.ConfigError, match=r"12, which 4 processes of 2 passes .* --batch 16"):
        config.check_ranks(4)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert own_device("cuda") == "cuda" and chosen == []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == "cuda:3" and chosen == [3]
    assert own_device("cpu") == "cpu"
