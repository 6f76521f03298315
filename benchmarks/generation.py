"""Time generation beside the exact cache against solving the whole window for every token.

    python benchmarks/generation.py --out benchmarks/results

Writes `generation.json` and `generation.png`: seconds per token at several lengths of the context,
of one model in float32, one thread. The whole window is timed at fewer lengths, for it is slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from altprop import Anderson
from altprop.lm.model import EquilibriumLM, ModelConfig

LENGTHS = (32, 64, 128, 256, 512, 1024)


def build(context: int, d_model: int) -> EquilibriumLM:
    """Return a seeded model that feeds back enough to need about as many evaluations as trained."""
    torch.manual_seed(0)
    model = EquilibriumLM(ModelConfig(65, context, d_model, 4), Anderson(), on_failure="raise")
    for p in model.block.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.04)
    torch.nn.init.uniform_(model.block.dynamics.alpha, -0.1, 0.1)
    return model.eval()


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of `work` after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure(d_model: int, repeats: int, longest: int) -> list[dict[str, float]]:
    """Return one row per length: seconds per token with the cache and without it."""
    model = build(max(LENGTHS), d_model)
    ids = torch.randint(65, (1, max(LENGTHS)))
    rows = []
    for length in LENGTHS:
        _, cache = model.extend(ids[:, : length - 1])
        new = ids[:, length - 1 : length]
        row: dict[str, float] = {
            "context": length,
            "cached": median_seconds(lambda n=new, c=cache: model.extend(n, c), repeats),
        }
        row["evaluations"] = model.block.certificate.free_evaluations
        if length <= longest:
            window = ids[:, :length]
            row["whole_window"] = median_seconds(lambda w=window: model(w), max(3, repeats // 4))
            row["window_evaluations"] = model.block.certificate.free_evaluations
        rows.append(row)
        print(row, flush=True)
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Draw both curves, with a line of slope 1 through the last cached figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    lengths = [row["context"] for row in rows]
    axes.plot(lengths, [row["cached"] for row in rows], "o-", label="new token beside the cache")
    whole = [(row["context"], row["whole_window"]) for row in rows if "whole_window" in row]
    axes.plot(*zip(*whole, strict=True), "s-", label="whole window")
    last = rows[-1]
    linear = [last["cached"] * n / last["context"] for n in lengths]
    axes.plot(lengths, linear, ":", color="grey", label="linear in the context")
    axes.set(xscale="log", yscale="log", xlabel="context in tokens", ylabel="seconds per token")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--longest-window", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.d_model, options.repeats, options.longest_window)
    at = next(row for row in rows if row["context"] == 256)
    speedup = at["whole_window"] / at["cached"]
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"d_model": options.d_model, "speedup_at_256": speedup, "rows": rows}
    (options.out / "generation.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, options.out / "generation.png")
    print(f"at 256 tokens the cache is {speedup:.1f} times as fast")


if __name__ == "__main__":
    main()
