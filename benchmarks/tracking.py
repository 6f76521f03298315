"""Frozen against tracking linearisation in AEP, on ten seeded systems.

Run `python benchmarks/tracking.py`; it writes `results/tracking.md` and `results/tracking.json`
beside itself. `linearise="free"` takes `J` at the free state once; `"tracking"` takes it at the
running mean of the two phases. Both are exact to the same order in β; this measures the constant.
Float64, every phase solved to 1e-10, so that the bias in β is all that is left.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

import altprop as ap

BETAS = (0.3, 0.1, 0.03, 0.01)
KINDS = ("free", "tracking")


def system(seed: int) -> tuple[str, ap.AbstractDynamics, Tensor, Tensor]:
    """Return a name, a dynamics, its input `(B, T, C)` and the weights of its cost."""
    torch.manual_seed(seed)
    B, T, C = 2, 6, 8
    if seed % 2 == 0:
        scale = (1.0, 2.0, 4.0, 8.0, 16.0)[seed // 2]
        name = f"damped attention, s = {scale:g}"
        dynamics: ap.AbstractDynamics = ap.DampedAttention(C, heads=2, scale=scale)
    else:
        spread = (0.1, 0.2, 0.3, 0.4, 0.5)[seed // 2]
        name = f"gated block, α ~ {spread:g}"
        dynamics = ap.GatedBlock(C, heads=2, init_std=0.2)
        torch.nn.init.normal_(dynamics.alpha, std=spread)
    x = torch.randn(B, T, C, dtype=torch.float64)
    return name, dynamics.double(), x, torch.randn_like(x)


def gradient(
    dynamics: ap.AbstractDynamics, x: Tensor, w: Tensor, estimator: ap.AbstractEstimator
) -> tuple[Tensor, int]:
    """Return the flat gradient by input and parameters, and the evaluations of the adjoint."""
    block = ap.Equilibrium(dynamics, ap.Anderson(tol=1e-13, max_steps=400), estimator)
    x = x.clone().requires_grad_()
    z = block(x)
    loss = (w * z + z**2 / 2).sum()
    parts = torch.autograd.grad(loss, [x, *dynamics.parameters()])
    assert block.certificate is not None
    return torch.cat([p.flatten() for p in parts]), block.certificate.adjoint_evaluations


def measure(seed: int) -> dict[str, object]:
    """Return the errors and evaluations of both kinds on one system, for every nudge."""
    name, dynamics, x, w = system(seed)
    exact, _ = gradient(dynamics, x, w, ap.Implicit(tol=1e-12, max_steps=400))
    row: dict[str, object] = {"seed": seed, "system": name}
    for kind in KINDS:
        found = []
        for beta in BETAS:
            estimator = ap.AEP(beta=beta, tol=1e-10, max_steps=400, linearise=kind)  # type: ignore[arg-type]
            value, evaluations = gradient(dynamics, x, w, estimator)
            error = float((value - exact).norm() / exact.norm())
            found.append({"beta": beta, "error": error, "evaluations": evaluations})
        row[kind] = found
    return row


def markdown(rows: list[dict[str, object]]) -> str:
    """Return the table and its summary."""
    heads = [f"β = {beta:g}: free" for beta in BETAS]
    lines = [
        "Relative error of the whole gradient; the smaller of a pair is bold. Evaluations: force, "
        "JVP, VJP and linearisations of both phases at β = 0.01.",
        "",
        "| system | "
        + " | ".join(f"{h} | tracking" for h in heads)
        + " | evaluations | tracking |",
        "|---|" + "---|" * (2 * len(BETAS) + 2),
    ]
    wins = {beta: 0 for beta in BETAS}
    ratios: dict[float, list[float]] = {beta: [] for beta in BETAS}
    for row in rows:
        free, tracking = (row[kind] for kind in KINDS)
        assert isinstance(free, list) and isinstance(tracking, list)
        cells = []
        for a, b in zip(free, tracking, strict=True):
            ratios[a["beta"]].append(b["error"] / a["error"])
            wins[a["beta"]] += b["error"] < a["error"]
            texts = [f"{a['error']:.1e}", f"{b['error']:.1e}"]
            best = int(b["error"] < a["error"])
            texts[best] = f"**{texts[best]}**"
            cells += texts
        cells += [str(free[-1]["evaluations"]), str(tracking[-1]["evaluations"])]
        lines.append(f"| {row['system']} | " + " | ".join(cells) + " |")
    lines.append("")
    for beta in BETAS:
        mean = math.exp(sum(map(math.log, ratios[beta])) / len(rows))
        lines.append(
            f"- β = {beta:g}: tracking is nearer on {wins[beta]} of {len(rows)}; geometric mean of "
            f"its error over the frozen one's: {mean:.2f}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [measure(seed) for seed in range(10)]
    where = Path(__file__).parent / "results"
    where.mkdir(exist_ok=True)
    table = markdown(rows)
    (where / "tracking.md").write_text("# Frozen and tracking linearisation\n\n" + table)
    (where / "tracking.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
