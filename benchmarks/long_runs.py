"""Tables and curves of long trainings: what `altprop train` left in folders, side by side.

    altprop train --data tinyshakespeare.txt --steps 14000 --out runs/long/ordinary-0 …
    python benchmarks/long_runs.py runs/long
    python benchmarks/long_runs.py runs/hinges --name hinges --at 1000 2000 3000   stopped there

Every folder below the given one is a run; `<arm>-<seed>` names it. Its metrics are thinned (every
hundredth step, every evaluation, and every step that was refused or took unusually long) and kept
with the table, and so are the runs of an earlier table whose folders are not there any more. The
cost of an arm's step is measured in units of a step of an ordinary model of as many blocks: both
are trained on from the runs' last checkpoints, in turn, in one process. With `--at`, an arm's seeds
share a row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from altprop.lab.building import build_model
from altprop.lab.config import read_config
from altprop.lab.evaluation import evaluate, tiles
from altprop.lab.sample_command import load_run
from altprop.lab.settings import TrainConfig
from altprop.lm.text import load_corpus
from common import RESULTS, markdown, write
from throughput import Loop, quartiles, seconds

EVERY, FREE, ADJOINT = 100, 25, 15  # steps that are kept; evaluations that are unusual
KINDS = ("free", "adjoint")
ROUNDS = 24  # pairs of steps that a cost is the median of


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, a line that is still being written left out."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is kept of a run's metrics."""
    kept, refused = [], 0
    for record in records:
        if "loss" not in record:
            kept.append(record)
            continue
        unusual = record["refused"] > refused
        unusual |= record.get("free_evaluations", 0) > FREE
        unusual |= record.get("adjoint_evaluations", 0) > ADJOINT
        if unusual or record["step"] % EVERY == 0:
            kept.append(record)
        refused = record["refused"]
    return kept


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run."""
    steps = [r for r in records if "loss" in r]
    losses = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    whole = [r["final_validation_loss"] for r in records if "final_validation_loss" in r]
    out: dict[str, Any] = {
        "steps": steps[-1]["step"],
        "validation": losses[max(losses)] if losses else None,
        "best": min(losses.values(), default=None),
        "whole": whole[-1] if whole else None,
        "refused": steps[-1]["refused"],
        "losses": losses,
    }
    for name in ("free_evaluations", "adjoint_evaluations"):
        values = [r[name] for r in steps if name in r]
        out[name] = [statistics.mean(values), max(values)] if values else None
    return out


def cost(folder: Path, data: str, step: int) -> tuple[float, float, float]:
    """Return quartiles of a run's step in units of the ordinary model's, as the docstring says.

    **Arguments:** `step`, how many the run has made, by which a stabiliser's margin may go.
    """
    model, tokenizer = load_run(folder, "last", "cpu")
    corpus = load_corpus(data)
    config = read_config(folder / "config.yaml", TrainConfig)
    config = replace(config, lr=1e-7)  # so that the weights stay what they are
    own = Loop(model.train(), config, corpus)
    layers = config.layers or (4 if config.model == "gpt" else 1)
    sizes = {n: getattr(config, n) for n in ("d_model", "heads", "context", "batch")}
    plain = TrainConfig(model="gpt", layers=layers, lr=1e-7, **sizes)
    unit = Loop(build_model(plain, len(tokenizer)), plain, corpus)
    own.step, unit.step = step, 1000  # past the warm-up
    ratios = []
    for number in range(ROUNDS + 2):
        spent = {}
        for step in random.sample([own, unit], 2):
            # four steps: a stabiliser acts in every second one, or fourth
            spent[step] = seconds(lambda step=step: [step() for _ in range(4)])  # type: ignore[misc]
        if number > 1:
            ratios.append(spent[own] / spent[unit])
    return quartiles(ratios)


def whole(folder: Path, data: str) -> float:
    """Return the last weights' cross-entropy over the whole validation part, without overlap."""
    model, _ = load_run(folder, "last", "cpu")
    corpus, context = load_corpus(data), model.config.context
    parts = tiles(corpus.validation, len(corpus.validation), context)
    return evaluate(model, parts, 16, torch.device("cpu")).loss


def draw(runs: dict[str, dict[str, Any]], costs: dict[str, float], file: Path, title: str) -> None:
    """Draw validation loss against steps, and against cost in ordinary steps."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    arms = sorted({arm_of(name) for name in runs})
    for name, run in sorted(runs.items()):
        arm = arm_of(name)
        turn, place = divmod(arms.index(arm), 10)  # of ten colours
        look: dict[str, Any] = {"color": f"C{place}", "ls": ("-", "--", ":")[turn % 3], "lw": 1.2}
        first = name == min(n for n in runs if arm_of(n) == arm)
        steps, losses = list(run["losses"]), list(run["losses"].values())
        left.plot(steps, losses, label=arm if first else None, **look)
        right.plot([costs[arm] * s / 1000 for s in steps], losses, **look)
    lowest = min(run["best"] for run in runs.values() if run["losses"])
    left.set_ylim(lowest - 0.03, lowest + 0.45)
    left.set_xlabel("step")
    left.set_ylabel("validation cross-entropy, nats")
    right.set_xlabel("cost, in thousands of the ordinary model's steps")
    right.set_xscale("log")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def earlier(name: str, folders: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the runs of the table that stands there already, but those that are measured anew."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))["results"]
    arms = {arm_of(folder) for folder in folders}
    runs = {run: figures for run, figures in known.items() if run not in folders}
    for run, figures in runs.items():
        figures["losses"] = {int(step): loss for step, loss in figures["losses"].items()}
        if arm_of(run) in arms:  # its arm's cost is measured anew
            figures.pop("cost", None)
    return runs


def together(runs: Collection[str], by_arm: bool) -> list[list[str]]:
    """Return the names that share a row: an arm's seeds, or each its own."""
    ordered = sorted(runs, key=lambda name: (arm_of(name), name))
    if not by_arm:
        return [[name] for name in ordered]
    return [list(names) for _, names in itertools.groupby(ordered, arm_of)]


def counted(counts: list[list[float] | None]) -> str:
    """Return the mean of evaluations over runs, and the worst of any step."""
    known = [count for count in counts if count is not None]
    if not known:
        return "–"
    return f"{statistics.mean(c[0] for c in known):.1f} / {max(c[1] for c in known):.0f}"


def number(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def arm_of(name: str) -> str:
    """Return the arm of a run `<arm>-<seed>`."""
    return name.rpartition("-")[0] or name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="plays", help="the text, to time a step of each arm")
    parser.add_argument("--name", default="long_runs")
    parser.add_argument("--title", default="Long trainings")
    parser.add_argument(
        "--at", type=int, nargs="+", help="steps whose validation is told, not the whole part"
    )
    given = parser.parse_args()
    folders = {f.parent.name: f.parent for f in sorted(given.folder.glob("*/metrics.jsonl"))}
    if not folders:
        raise SystemExit(f"{given.folder} holds no runs: give the folder that theirs lie in")
    runs, costs, rows = earlier(given.name, folders), {}, []
    costs.update({arm_of(name): run["cost"][1] for name, run in runs.items() if "cost" in run})
    kept = RESULTS / given.name
    kept.mkdir(parents=True, exist_ok=True)
    for name, folder in folders.items():
        records = read(folder)
        runs[name] = summary(records)
        if runs[name]["whole"] is None and not given.at:
            runs[name]["whole"] = whole(folder, given.data)
        lines = (json.dumps(record) for record in thinned(records))
        (kept / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        arm = arm_of(name)
        if arm not in costs:
            runs[name]["cost"] = cost(folder, given.data, runs[name]["steps"])
            costs[arm] = runs[name]["cost"][1]
    runs = dict(sorted(runs.items()))
    for names in together(runs, by_arm=bool(given.at)):
        beside = [runs[name] for name in names]
        if given.at:
            told = [[run["losses"].get(step) for run in beside] for step in given.at]
        else:
            told = [[run[figure] for run in beside] for figure in ("validation", "whole")]
        seeds = ", ".join(name.rpartition("-")[2] for name in names)
        arm = arm_of(names[0])
        rows.append(
            [
                f"{arm}-{seeds}",
                f"{max(run['steps'] for run in beside):,}".replace(",", " "),
                *(", ".join(map(number, losses)) for losses in told),
                *(counted([run[f"{kind}_evaluations"] for run in beside]) for kind in KINDS),
                ", ".join(str(run["refused"]) for run in beside),
                f"{costs[arm]:.1f}",
            ]
        )
    told_at = [f"at {step:,}".replace(",", " ") for step in given.at or ()]
    head = ["run", "steps", *(told_at or ["validation", "whole part"]), "free, mean / worst"]
    head += ["adjoint, mean / worst", "refused", "cost of a step"]
    whole_part = "" if given.at else ", and on the whole part in windows that do not overlap"
    note = (
        f"Validation: cross-entropy in nats on 320 fixed windows{whole_part}; evaluations per "
        "step; cost in steps of the ordinary model."
    )
    write(given.name, given.title, [markdown(head, rows), note], runs)
    draw(runs, costs, RESULTS / f"{given.name}.png", given.title)


if __name__ == "__main__":
    main()
