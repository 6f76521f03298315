"""What the tests of many processes run in each of them: ten steps of every rule, in float64."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import altprop as ap
from altprop.lab.building import build_model
from altprop.lab.ranks import Ranks, full, joined
from altprop.lab.settings import TrainConfig
from altprop.lab.train import begin_with, predicted, steps
from altprop.lm.text import Batches

V, STEPS = 11, 10
EXACT: dict[str, Any] = {"solver": ap.Anderson(tol=1e-10, max_steps=200), "eval_windows": 1}
AEP = ap.AEP(tol=1e-8, solver=ap.Anderson())
STRICT = ap.JacobianHinge(target=0.01, token_target=0.01)  # past the margin from the first step
GPT: dict[str, Any] = {"model": "gpt", "layers": 2}
CASES: dict[str, dict[str, Any]] = {
    "AEP": {"estimator": AEP, "stabiliser": STRICT, **EXACT},
    "AEP, joint": {"estimator": AEP, "stabiliser": STRICT, "layers": 2, **EXACT},
    "AEP, separate": {
        "estimator": AEP,
        "stabiliser": STRICT,
        "layers": 2,
        "stacking": "separate",
        **EXACT,
    },
    "OneStep, gate hinge": {
        "estimator": ap.OneStep(),
        "solver": ap.Euler(step=0.5, max_steps=3, tol=0),
        "stabiliser": ap.GateHinge(target=0.01),
    },
    # what an adjoint leaves is a direction of the hinge: nearer to zero it is that of the rounding
    "Implicit": {"estimator": ap.Implicit(tol=1e-8), "stabiliser": STRICT, **EXACT},
    "backprop": GPT,
    "FA": {**GPT, "rule": ap.FeedbackAlignment()},
    "sign symmetry": {**GPT, "rule": ap.SignSymmetry()},
    "Kolen-Pollack": {**GPT, "rule": ap.KolenPollack()},
    "weight mirror": {**GPT, "rule": ap.WeightMirror()},
    "aligned": {**GPT, "rule": ap.AlignedFeedback()},
    "DFA": {**GPT, "rule": ap.DirectFeedback(calibrate_every=3)},
    "DFA, blocks": {**GPT, "rule": ap.DirectFeedback(granularity="block")},
    "GrAPE": {**GPT, "rule": ap.GrAPE(probes=2)},
    "dropout": {**GPT, "dropout": 0.2},
    "average": {**GPT, "ema": 0.5},
}


def learned(name: str, ranks: Ranks, **options: Any) -> dict[str, Tensor]:
    """Return the weights, the average's, and what the steps measured, after ten steps of a case."""
    config = TrainConfig(
        **{
            **{"d_model": 8, "heads": 2, "context": 6, "batch": 8, "steps": STEPS, "warmup": 0},
            **{"on_failure": "stop", "clip": 0.1, "device": "cpu"},
            **CASES[name],
            **options,
        }
    )
    torch.manual_seed(0)
    model = build_model(config, V).double()
    for _, block in ap.equilibria(model):  # whose gates start closed: nothing feeds back
        nn.init.constant_(cast(Tensor, block.dynamics.gate), 0.3)
    tokens = torch.randint(V, (200,), generator=torch.Generator().manual_seed(1)).numpy()
    drawn = torch.Generator().manual_seed(2)
    batches = Batches(tokens, config.batch, config.context, drawn)
    state, guard = begin_with(config, model, predicted, batches, ranks)
    made = list(steps(config, state, guard, ranks))
    out = {n: full(t.detach()).clone() for n, t in state.model.state_dict().items()}
    if state.average is not None:
        out |= {f"{n} (average)": full(t) for n, t in state.judged.state_dict().items()}
    kept = ("loss", "gradient_norm", "jacobian_gain")
    for number, record in enumerate(made):
        out |= {f"{k} {number}": torch.tensor(record[k]) for k in kept if k in record}
    return out


def start(count: int, *words: str) -> list[subprocess.Popen[str]]:
    """Start so many processes of a Python command line, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(filter(None, sys.path))
    around = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**around, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end(ranks: list[subprocess.Popen[str]]) -> None:
    """Leave no process behind."""
    for rank in ranks:
        rank.kill()
        rank.communicate()


def ended(ranks: list[subprocess.Popen[str]], timeout: float = 200) -> list[tuple[int, str, str]]:
    """Return every rank's exit status, output and errors."""
    try:
        said = [rank.communicate(timeout=timeout) for rank in ranks]
        return [(rank.returncode, *both) for rank, both in zip(ranks, said, strict=True)]
    finally:
        end(ranks)


def until(file: Path, count: int, ranks: list[subprocess.Popen[str]]) -> None:
    """Wait until a run has logged so many steps."""
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_text().count('"lr"') < count:
        if time.monotonic() > deadline or any(rank.poll() is not None for rank in ranks):
            end(ranks)
            raise AssertionError([rank.stderr for rank in ranks])
        time.sleep(0.02)


def together(count: int, wanted: Sequence[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return what so many processes learn, by `parallel:accumulate:case`."""
    out = folder / f"{count}.pt"
    found = ended(start(count, __file__, str(out), *wanted), timeout=400)
    assert [status for status, *_ in found] == [0] * count, found[0][2]
    return dict(torch.load(out))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Return by how much two outcomes differ, each tensor relative to its largest entry."""
    assert one.keys() == other.keys()
    return {
        name: float((t.double() - other[name].double()).abs().max() / t.double().abs().max())
        for name, t in one.items()
        if t.any() or other[name].any()
    }


def main(out: str, *wanted: str) -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        found = {}
        for words in wanted:
            parallel, accumulate, name = words.split(":")
            found[words] = learned(name, ranks, parallel=parallel, accumulate=int(accumulate))
        if ranks.leads:
            torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
