"""Comparisons that nobody has run, for the tests of what is shown of them; quick ones."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

RULES = (
    *("SignSymmetry()", "FeedbackAlignment(init='orthogonal')", "FeedbackAlignment()"),
    *("KolenPollack()", "WeightMirror()", "DirectFeedback()", "BlockDirectFeedback()", "GrAPE()"),
    *("AlignedFeedback()", "SignSymmetry(scale='fan')", "DirectFeedback(granularity='matmul')"),
)


def compare_quickly(monkeypatch: MonkeyPatch, folder: Path) -> None:
    """Let comparisons measure their costs once, and work in a folder."""
    monkeypatch.setattr("altprop.lab.compare.cost.ROUNDS", 1)
    monkeypatch.setattr("altprop.lab.compare.cost.SHORT", -1.0)
    monkeypatch.setattr("altprop.lab.compare.cost.peak_live_bytes", lambda step: 1)
    monkeypatch.chdir(folder)


def made(arms: int = 6, seeds: int = 3, points: int = 12, draw: int = 0) -> dict[str, Any]:
    """Return the results of a comparison of so many arms, two of them controls."""
    chance = random.Random(draw)
    more = (f"DirectFeedback(scale={0.1 * i:.1f})" for i in range(arms))
    names = ["backprop", "frozen", *RULES, *more][:arms]
    found = [_arm(name, i, seeds, points, chance) for i, name in enumerate(names)]
    return {
        "format": "altprop-comparison/1",
        "task": {
            "name": "digits", "data": "scikit-learn's digits, 1,797 images of 8 × 8",
            "score": "accuracy", "unit": "%", "better": "higher", "chance": 10.0,
        },
        "steps": 300, "seeds": list(range(seeds)), "finished": True, "arms": found,
    }  # fmt: skip


def _arm(name: str, index: int, seeds: int, points: int, chance: random.Random) -> dict[str, Any]:
    control = name in ("backprop", "frozen")
    share = {"backprop": 1.0, "frozen": 0.0}.get(name, 1.02 - 0.09 * index)
    mean = 88.0 + 9.4 * share
    steps = [round(300 * (i + 1) / points) for i in range(points)]

    def curve(seed: int) -> dict[str, Any]:
        shift = chance.gauss(0, 0.4)
        parts = [1 - math.exp(-step / (40 + 6 * index)) for step in steps]
        score = [10 + (mean - 10 + shift) * part + chance.gauss(0, 0.3) for part in parts]
        loss = [2.3 - 2.1 * part * mean / 97 + chance.gauss(0, 0.01) for part in parts]
        return {"seed": seed, "steps": steps, "loss": loss, "score": score}

    curves = [curve(seed) for seed in range(seeds)]
    return {
        "name": name, "rule": name, "control": control, "refused": None, "failed": None,
        "rates": [
            {"lr": lr, "score": None if lr > 0.05 else mean - 2 * abs(math.log10(lr / 3e-3)),
             "failed": lr > 0.05}
            for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
        ],
        "lr": 3e-3, "edge": index == 4,
        "scores": [c["score"][-1] for c in curves],
        "mean": mean, "interval": [mean - 0.5 - 0.1 * index, mean + 0.5 + 0.1 * index],
        "difference": {"mean": mean - 97.4, "interval": [mean - 98.0, mean - 96.8]},
        "recovery": {"mean": share, "interval": [share - 0.06 - 0.01 * index, share + 0.07]},
        "cost": {
            "seconds_per_step": 2.1e-3 * (1 + 0.1 * index), "relative": 1 + 0.1 * index,
            "evaluations": None, "peak_bytes": 3_400_000 + 90_000 * index,
            "carried_numbers": 20_480 * index, "parameters": 108_234,
        },
        "equal_cost": {"steps": round(300 / (1 + 0.1 * index)), "mean": mean - 0.3 * index,
                       "interval": [mean - 0.3 * index - 0.6, mean - 0.3 * index + 0.6]},
        "curves": curves,
        "audit": [] if name == "frozen" else [
            {"step": step, "groups": [
                {"name": f"hidden.{layer}.weight", "ratio": 2.0 ** (index - 3 + layer),
                 "cosine": min(1.0, max(-1.0, share - 0.15 * (4 - layer) * (1 - share)
                                        + chance.gauss(0, 0.02)))}
                for layer in range(5)]}
            for step in (0, 60, 120, 180, 240, 300)
        ],
        "read": [
            {"parameter": f"hidden.{layer}.weight",
             "how": "carried as a matrix (mm × 1)" if name == "backprop" or layer == 4
             else "not read"}
            for layer in range(5)
        ],
    }  # fmt: skip


def write(folder: Path, results: dict[str, Any]) -> Path:
    """Write a comparison's folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "comparison.yaml").write_text("task: digits\nsteps: 300\n", encoding="utf-8")
    record = {
        "command": "altprop compare --task digits --steps 300 --out runs/digits",
        "versions": {"altprop": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "machine": "a processor, Linux", "threads": 1, "started": "2026-01-31T12:00:00+0000",
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
