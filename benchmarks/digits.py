"""scikit-learn's digits, a 64-256-256-10 tanh MLP: backprop, every rule, and frozen hidden layers.

Each arm has the learning rate that is best on a validation part of the training images, found by
the same search; the table shows the test images, which nothing was chosen by.
Run: `python benchmarks/digits.py` (needs scikit-learn; a few minutes on one thread).
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import altprop as ap
from common import markdown, write

Data = tuple[Tensor, Tensor]
RATES = (1e-3, 3e-3)
EPOCHS, BATCH, SEEDS = 15, 32, (0, 1, 2)

ARMS: dict[str, ap.AbstractRule | None] = {
    "backprop": ap.Backprop(),
    "feedback alignment": ap.FeedbackAlignment(std=0.06),
    "feedback alignment, orthogonal": ap.FeedbackAlignment(init="orthogonal", std=0.06),
    "sign symmetry": ap.SignSymmetry(),
    "sign symmetry, redrawn sizes": ap.SignSymmetry(variant="brsf"),
    "Kolen-Pollack": ap.KolenPollack(std=0.06),
    "weight mirror": ap.WeightMirror(std=0.06),
    "aligned feedback": ap.AlignedFeedback(std=0.06),
    "DFA, matmul, hybrid": ap.DirectFeedback(feedback="independent", std=0.3),
    "DFA, block": ap.DirectFeedback("block", feedback="independent", std=0.3),
    "DFA, block, calibrated": ap.DirectFeedback(
        "block", feedback="independent", std=0.3, calibrate_every=10
    ),
    "block-wise DFA": ap.BlockDirectFeedback(std=0.06),
    "GrAPE": ap.GrAPE(std=0.3),
    "GrAPE, calibrated": ap.GrAPE(std=0.3, calibrate_every=10),
    "frozen hidden layers": None,
}


def split() -> tuple[Data, Data, Data]:
    """Return 1197 training, 240 validation and 360 test images, pixels in [0, 1]."""
    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.split([1197, 240, 360])
    return tuple((x[part], y[part]) for part in parts)  # type: ignore[return-value]


def model() -> nn.Sequential:
    hidden = [nn.Sequential(nn.Linear(a, 256), nn.Tanh()) for a in (64, 256)]
    return nn.Sequential(*hidden, nn.Linear(256, 10))


def accuracy(net: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((net(data[0]).argmax(1) == data[1]).float().mean())


def train(rule: ap.AbstractRule | None, rate: float, seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    net = model()
    if rule is None:
        net[:2].requires_grad_(False)
    elif "blocks" in rule.takes and "maps" not in rule.takes:
        ap.convert(net, {"0": rule, "1": rule}, output="2", seed=seed)
    else:
        ap.convert(net, rule, output="2", seed=seed)
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=rate, weight_decay=0.01
    )
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net


def main() -> None:
    training, validation, test = split()
    rows, data = [], {}
    for name, rule in ARMS.items():
        start = time.perf_counter()
        best, best_rate = -1.0, RATES[0]
        for rate in RATES:
            score = accuracy(train(rule, rate, SEEDS[0], training), validation)
            if score > best:
                best, best_rate = score, rate
        scores = [100 * accuracy(train(rule, best_rate, seed, training), test) for seed in SEEDS]
        mean, spread = statistics.mean(scores), statistics.stdev(scores)
        seconds = time.perf_counter() - start
        data[name] = {"rule": str(rule), "rate": best_rate, "test": scores}
        first = statistics.mean(data["backprop"]["test"])
        rows.append([name, f"{mean:.1f} ± {spread:.1f}", f"{mean - first:+.1f}", f"{best_rate:g}"])
        print(rows[-1], f"{seconds:.0f} s", flush=True)
    table = markdown(["arm", "test accuracy, %", "to backprop", "rate"], rows)
    note = f"Mean ± standard deviation over 3 seeds, {EPOCHS} epochs, batch {BATCH}, AdamW."
    write("digits", "Digits, 64-256-256-10", [note, table], data)


if __name__ == "__main__":
    main()
