"""Which rule trains a GPT how far: validation cross-entropy on Shakespeare, at equal steps.

    python benchmarks/shakespeare_rules.py --data tinyshakespeare.txt --steps 1000

Every arm trains the same 4-block GPT (C = 128, T = 64, batch 16) from one initialisation on the
same batches. Its learning rate is the best of the same few after a short run of the same length
for every arm. `frozen blocks` trains embeddings, norm and head alone; recovery is
(frozen − rule) / (frozen − backprop). `--arm` runs one arm and writes its own file, so that arms
can run side by side; the table is written from every file that is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import altprop as ap
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train

ARMS: dict[str, dict[str, Any]] = {
    "backprop": {},
    "frozen blocks": {"freeze": ("blocks.*",)},
    "feedback alignment": {"rule": ap.FeedbackAlignment()},
    "feedback alignment, orthogonal": {"rule": ap.FeedbackAlignment(init="orthogonal")},
    "sign symmetry": {"rule": ap.SignSymmetry()},
    "Kolen-Pollack": {"rule": ap.KolenPollack()},
    "weight mirror": {"rule": ap.WeightMirror()},
    "aligned feedback": {"rule": ap.AlignedFeedback()},
    "DFA, every matrix (hybrid)": {"rule": ap.DirectFeedback()},
    "DFA, sublayers": {"rule": ap.DirectFeedback(granularity="sublayer")},
    "DFA, blocks": {"rule": ap.DirectFeedback(granularity="block")},
    "DFA, blocks + calibration": {
        "rule": ap.DirectFeedback(granularity="block", calibrate_every=20)
    },
    "block-wise DFA": {"rule": ap.BlockDirectFeedback()},
    "GrAPE": {"rule": ap.GrAPE()},
    "GrAPE + calibration": {"rule": ap.GrAPE(calibrate_every=20)},
}
RATES = (1e-3, 3e-3)
TITLE = """# Rules on Shakespeare

A 4-block GPT (C = 128, T = 64, batch 16), validation cross-entropy in nats; recovery is
(frozen − rule) / (frozen − backprop).

"""


def run(arm: str, data: str, lr: float, steps: int, schedule: int) -> float:
    """Return the validation cross-entropy of an arm after `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            data=data, model="gpt", layers=4, lr=lr, steps=steps, warmup=schedule,
            eval_every=steps, sample=0, out=Path(folder) / "run", **ARMS[arm],
        )  # fmt: skip
        return train(config).best_loss


def measure(arm: str, data: str, steps: int, search: int) -> dict[str, Any]:
    """Search the rate of an arm, then train it in full."""
    tried = {lr: run(arm, data, lr, search, min(100, search // 4)) for lr in RATES}
    best = min(tried, key=tried.__getitem__)
    loss = run(arm, data, best, steps, min(100, steps // 4))
    return {"arm": arm, "loss": loss, "lr": best, "search": {str(k): v for k, v in tried.items()}}


def table(rows: list[dict[str, Any]], command: str) -> str:
    """Return the rows as Markdown, best first."""
    losses = {row["arm"]: row["loss"] for row in rows}
    gap = losses.get("frozen blocks", float("nan")) - losses.get("backprop", float("nan"))
    lines = ["| arm | validation cross-entropy | recovery | learning rate |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: float(r["loss"])):
        recovery = (losses.get("frozen blocks", float("nan")) - row["loss"]) / gap
        lines.append(f"| {row['arm']} | {row['loss']:.3f} | {recovery:.0%} | {row['lr']:g} |")
    return "\n".join([*lines, "", f"One seed. `{command}`, torch {torch.__version__}, CPU.", ""])


def main() -> None:
    """Run the arms that were asked for and write what is known of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="plays")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--search", type=int, default=150)
    parser.add_argument("--arm", action="append", choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    parts = options.out / "shakespeare_rules"
    parts.mkdir(parents=True, exist_ok=True)
    for arm in options.arm or ARMS:
        row = measure(arm, options.data, options.steps, options.search)
        name = "".join(c if c.isalnum() else "_" for c in arm)
        (parts / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
    rows = [json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))]
    data = Path(options.data).name
    command = f"python benchmarks/shakespeare_rules.py --data {data} --steps {options.steps}"
    text = table(rows, command)
    (options.out / "shakespeare_rules.md").write_text(TITLE + text)
    record = {"command": command, "results": rows}
    (options.out / "shakespeare_rules.json").write_text(json.dumps(record, indent=1))
    print(text)


if __name__ == "__main__":
    main()
