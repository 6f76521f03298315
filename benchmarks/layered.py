"""Train one GPT-like model by layered AEP and by backprop from one initialisation.

    python benchmarks/layered.py path/to/tinyshakespeare.txt --out benchmarks/results

Writes `layered.json`: both arms' training losses, their validation losses at the end, and what
the AEP arm's certificates said. Both arms see the same batches with the same optimiser.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from altprop import AEP, convert, equilibria
from altprop.lm.model import GPT, ModelConfig


def read(path: Path) -> tuple[Tensor, Tensor, int]:
    """Return the characters of a text as numbers, the last tenth apart, and their number."""
    text = path.read_text(encoding="utf-8")
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[c] for c in text])
    split = len(ids) * 9 // 10
    return ids[:split], ids[split:], len(known)


def windows(ids: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    rows = torch.stack([ids[s : s + context + 1] for s in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def validate(model: nn.Module, ids: Tensor, context: int, count: int) -> float:
    starts = torch.linspace(0, len(ids) - context - 1, count).long()
    losses = [model(*windows(ids, part, context))[1] for part in starts.split(16)]
    sizes = torch.tensor([len(part) for part in starts.split(16)]).float()
    return float((torch.stack(losses) * sizes).sum() / sizes.sum())


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """Train one arm and return its figures."""
    ids, held_out = data
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99))
    losses: list[float] = []
    residuals: list[float] = []
    evaluations: list[int] = []
    seconds: list[float] = []
    for step in range(options.steps):
        start = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / options.warmup)
        starts = torch.randint(
            len(ids) - options.context - 1, (options.batch,), generator=generator
        )
        optimiser.zero_grad(set_to_none=True)
        loss = model(*windows(ids, starts, options.context))[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
        for _, block in equilibria(model):
            residuals.append(float(block.certificate.adjoint_residual.max()))
            evaluations.append(block.certificate.adjoint_evaluations)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {sum(losses[-50:]) / 50:.4f}", flush=True)
    out: dict[str, Any] = {
        "validation_loss": validate(model, held_out, options.context, options.eval_windows),
        "seconds_per_step": statistics.median(seconds),
        "losses": losses,
    }
    if residuals:
        out["worst_adjoint_residual"] = max(residuals)
        out["mean_adjoint_evaluations"] = sum(evaluations) / len(evaluations)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--eval-windows", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids, held_out, vocabulary = read(options.text)
    torch.manual_seed(options.seed)
    config = ModelConfig(
        vocabulary, options.context, options.d_model, options.heads, layers=options.layers
    )
    by_backprop = GPT(config)
    by_aep = convert(copy.deepcopy(by_backprop), {"blocks": AEP()}, on_failure="warn")
    report: dict[str, Any] = {"settings": {**vars(options), "text": options.text.name}}
    report["settings"].pop("out")
    for name, model in (("aep", by_aep), ("backprop", by_backprop)):
        print(name, flush=True)
        report[name] = train(model, (ids, held_out), options)
    gap = report["aep"]["validation_loss"] - report["backprop"]["validation_loss"]
    report["gap"] = gap
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "layered.json").write_text(json.dumps(report, indent=1) + "\n")
    for name in ("aep", "backprop"):
        arm = report[name]
        milliseconds = arm["seconds_per_step"] * 1e3
        print(f"{name}: {arm['validation_loss']:.4f} nats, {milliseconds:.0f} ms a step")
    print(f"gap {gap:+.4f}")


if __name__ == "__main__":
    main()
