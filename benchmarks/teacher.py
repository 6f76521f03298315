"""Random-ReLU-teacher labels: how much of backprop's gain DFA recovers as the classes grow.

Published figures: OriPekelman/toy, `toy train mlp` (seed 0, 2048 held-out samples). The problem is
theirs draw by draw, since one teacher differs from the next by more than the tolerance: Gaussian
inputs (32) and labels `argmax T₂ relu(T₁ x)`, all from a 31-bit linear congruential stream, one
fixed teacher (hidden 32) per number of classes. The student has three bias-free SiLU layers of 64,
weights `N(0, 1/fan_in)` from the same kind of stream; the feedback is our own draw. AdamW 3e-3,
batch 64, 1000 steps. DFA taps each layer *after* its activation, so that the derivative of the
activation enters; the head learns exactly in every arm.
Run: `python benchmarks/teacher.py` (under two minutes on one thread).
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import altprop as ap
from common import markdown, write

PUBLISHED = {
    2: (0.940, 0.942, 0.772),
    10: (0.773, 0.742, 0.516),
    100: (0.559, 0.412, 0.273),
    1000: (0.411, 0.265, 0.162),
}
ARMS = ("backprop", "DFA", "frozen")
FEATURES, HIDDEN, TEACHER, BATCH, STEPS, HELD_OUT = 32, 64, 32, 64, 1000, 2048
TOLERANCE = 0.03
TASK_SEED = 7


def gaussians(seed: int, count: int) -> np.ndarray:
    """Return Box-Muller normals from `s ← 1103515245 s + 12345 mod 2³¹`, the published stream."""
    mask = np.uint64(2**31 - 1)
    state = ((seed + 104729) * 2654435761) % (2**31 - 1) or seed + 104729
    for _ in range(8 + 1):  # eight discarded, the ninth is the first that is used
        state = (state * 1103515245 + 12345) % 2**31
    states = np.array([state], dtype=np.uint64)
    a, c = 1103515245, 12345
    while len(states) < 2 * count:  # doubling: the next n states from the last n
        states = np.concatenate([states, (states * np.uint64(a) + np.uint64(c)) & mask])
        a, c = a * a % 2**31, (a * c + c) % 2**31
    u = (states[: 2 * count].astype(np.float64) + 1) / 2**31
    return np.sqrt(-2 * np.log(np.maximum(u[::2], 1e-12))) * np.cos(2 * np.pi * u[1::2])


def problem(classes: int, x: Tensor) -> Tensor:
    """Return the teacher's labels of `x` (n, 32)."""
    draws = gaussians(TASK_SEED, TEACHER * FEATURES + classes * TEACHER)
    first = torch.tensor(draws[: TEACHER * FEATURES].reshape(TEACHER, FEATURES) / FEATURES**0.5)
    second = torch.tensor(draws[TEACHER * FEATURES :].reshape(classes, TEACHER) / TEACHER**0.5)
    labels = [((part @ first.T).relu() @ second.T).argmax(1) for part in x.double().split(4096)]
    return torch.cat(labels)


def student(classes: int, seed: int) -> nn.Sequential:
    widths = (FEATURES, HIDDEN, HIDDEN, HIDDEN)
    layers = [
        nn.Sequential(nn.Linear(a, b, bias=False), nn.SiLU())
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]
    model = nn.Sequential(*layers, nn.Linear(HIDDEN, classes, bias=False))
    weights = list(model.parameters())
    draws = torch.tensor(gaussians(seed, sum(weight.numel() for weight in weights)))
    parts = draws.split([weight.numel() for weight in weights])
    with torch.no_grad():
        for weight, part in zip(weights, parts, strict=True):
            weight.copy_(part.view_as(weight) / weight.shape[1] ** 0.5)
    return model


def accuracy(arm: str, classes: int, seed: int, x: Tensor, y: Tensor) -> float:
    """Train one arm and return its accuracy on the held-out samples, the first of the stream."""
    model = student(classes, seed)
    if arm == "DFA":
        rule = ap.DirectFeedback("block", feedback="independent", std=classes**-0.5)
        ap.convert(model, {f"{i}": rule for i in range(3)}, output="3", seed=seed)
    elif arm == "frozen":
        model[:3].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(STEPS):
        rows = slice(HELD_OUT + step * BATCH, HELD_OUT + (step + 1) * BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(x[:HELD_OUT]).argmax(1) == y[:HELD_OUT]).float().mean())


def main() -> None:
    start = time.perf_counter()
    count = HELD_OUT + STEPS * BATCH
    draws = gaussians(TASK_SEED + 1, count * FEATURES).reshape(count, FEATURES)
    x = torch.tensor(draws, dtype=torch.float32)
    rows, data, misses = [], [], []
    for classes, published in PUBLISHED.items():
        y = problem(classes, x)
        found = {arm: [accuracy(arm, classes, seed, x, y) for seed in range(3)] for arm in ARMS}
        means = [statistics.mean(found[arm]) for arm in ARMS]
        cells = [
            f"{mean:.3f} ({min(found[arm]):.3f}–{max(found[arm]):.3f}), published {was:.3f}"
            for arm, mean, was in zip(ARMS, means, published, strict=True)
        ]
        recovery = (means[1] - means[2]) / (means[0] - means[2])
        rows.append([str(classes), *cells, f"{recovery:.2f}"])
        data.append({"classes": classes, "accuracies": found, "published": published})
        for arm, mean, was in zip(ARMS, means, published, strict=True):
            if abs(mean - was) > TOLERANCE:
                misses.append(f"{arm} at {classes} classes is {mean - was:+.3f} off")
    verdict = "Missed: " + "; ".join(misses) if misses else "All means are within 0.03."
    note = (
        f"Mean (lowest–highest) accuracy over seeds 0, 1, 2 of the student and of the feedback. "
        f"{verdict} Took {time.perf_counter() - start:.0f} s, of which {time.process_time():.0f} s "
        "on the processor."
    )
    table = markdown(["classes", *ARMS, "recovery"], rows)
    write("teacher", "Direct feedback on random-ReLU-teacher labels", [note, table], data)


if __name__ == "__main__":
    main()
