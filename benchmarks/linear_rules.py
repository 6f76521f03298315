"""What a rule costs: time and memory of a linear map and of a GPT's step, against plain PyTorch.

Paired: every round runs every arm once, in random order, and an arm's figure is the median over
rounds of its processor time divided by the plain arm's in the same round, with the quartiles. One
thread; other programs on the machine widen the quartiles. Peak memory is of a call by itself.
biotorch, where it is installed (`pip install --no-deps --target <folder> biotorch`, then that
folder on PYTHONPATH), runs beside. Run: `python benchmarks/linear_rules.py` (eight minutes).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import altprop as ap
from altprop.auditing.memory import peak_live_bytes
from altprop.lab.timing import paired, ratio
from altprop.lm.model import GPT, ModelConfig
from common import markdown, write

TRANSPORTS: dict[str, ap.AbstractRule] = {
    "Backprop": ap.Backprop(),
    "FeedbackAlignment": ap.FeedbackAlignment(),
    "SignSymmetry": ap.SignSymmetry(),
    "SignSymmetry, fan_in": ap.SignSymmetry(scale="fan_in"),
    "SignSymmetry, brsf": ap.SignSymmetry(variant="brsf"),
    "SignSymmetry, frsf": ap.SignSymmetry(variant="frsf"),
    "KolenPollack": ap.KolenPollack(),
    "WeightMirror": ap.WeightMirror(),
    "AlignedFeedback": ap.AlignedFeedback(),
}
BROADCASTS: dict[str, ap.AbstractRule] = {
    "DirectFeedback, matmul": ap.DirectFeedback(),
    "DirectFeedback, matmul, pure": ap.DirectFeedback(pass_through="pure"),
    "DirectFeedback, sublayer": ap.DirectFeedback(granularity="sublayer"),
    "DirectFeedback, block": ap.DirectFeedback(granularity="block"),
    "DirectFeedback, block, independent": ap.DirectFeedback("block", feedback="independent"),
    "BlockDirectFeedback": ap.BlockDirectFeedback(),
    "GrAPE": ap.GrAPE(),
}
SIZES = ((1024, 1024, 4096, 41), (128, 512, 1024, 700), (512, 128, 1024, 700))
CONFIG = ModelConfig(vocabulary=65, context=64, d_model=128, heads=4, layers=6)
BATCH, STEPS = 16, 21
MIB = 2**20


class Cost(NamedTuple):
    """Processor time in units of the plain arm's, with its quartiles, and peak memory."""

    median: float
    lower: float
    upper: float
    bytes: int

    def cells(self) -> list[str]:
        spread = f"{self.median:.3f} ({self.lower:.3f} to {self.upper:.3f})"
        return [spread, f"{self.bytes / MIB:.2f}"]


def costs(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Cost]:
    """Compare every arm with the first."""
    times = paired(arms, rounds)
    plain = next(iter(times))
    found = {}
    for name in times:
        each = ratio(times, name, plain)
        found[name] = Cost(each.median, each.low, each.high, peak_live_bytes(arms[name]))
    return found


def biotorch_kinds() -> dict[str, type[nn.Module]]:
    """Return biotorch's feedback-alignment and sign-symmetry layers, if it can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from biotorch.layers.fa import Linear as Alignment
            from biotorch.layers.usf import Linear as Signs
    except ImportError:
        return {}
    return {"biotorch FA": Alignment, "biotorch uSF": Signs}


def linear(into: int, out: int, tokens: int, rounds: int) -> dict[str, Cost]:
    """Time forward and backward on (tokens, in): what biotorch can take as well."""
    x = torch.randn(tokens, into, requires_grad=True)
    g = torch.randn(tokens, out)
    layers: dict[str, nn.Module] = {"nn.Linear": nn.Linear(into, out)}
    layers |= {name: ap.convert(nn.Linear(into, out), rule) for name, rule in TRANSPORTS.items()}
    layers |= {name: kind(into, out) for name, kind in biotorch_kinds().items()}

    def step(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            layer.zero_grad()
            x.grad = None
            layer(x).backward(g)

        return run

    return costs({name: step(layer) for name, layer in layers.items()}, rounds)


class Rows(nn.Module):
    """A layer that takes matrices only, on any number of axes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def replaced(model: GPT, kind: type[nn.Module]) -> GPT:
    """Put biotorch's layer in the place of every linear map."""
    maps = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    for path, m in maps.items():
        parent, _, name = path.rpartition(".")
        layer = Rows(kind(m.in_features, m.out_features, m.bias is not None))
        setattr(model.get_submodule(parent), name, layer)
    return model


def models() -> dict[str, GPT]:
    """Return one GPT per rule that it can be converted to, and with biotorch's layers."""
    found = {"plain GPT": GPT(CONFIG)}
    for name, rule in {**TRANSPORTS, **BROADCASTS}.items():
        found[name] = ap.convert(GPT(CONFIG), rule, output="head")
    for name, kind in biotorch_kinds().items():
        found[name] = replaced(GPT(CONFIG), kind)
    return found


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(CONFIG.vocabulary, (BATCH, CONFIG.context + 1))
    return ids[:, :-1], ids[:, 1:]


def model_step() -> dict[str, Cost]:
    """Time a training step; learned feedback is in the optimiser too."""
    ids, targets = batch()
    arms: dict[str, Callable[[], None]] = {}
    for name, net in models().items():
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

        def run(net: GPT = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            net(ids, targets)[1].backward()
            optimizer.step()

        arms[name] = run
    return costs(arms, STEPS)


def independent_blocks() -> dict[str, Cost]:
    """Compare backprop's backward pass with the longest part of one by direct feedback.

    Under block-wise direct feedback no block waits for another, so with a processor for each the
    backward pass lasts as long as its slowest block's, and what is alive is one block's.
    """
    ids, targets = batch()
    plain = GPT(CONFIG)
    direct = ap.convert(GPT(CONFIG), BROADCASTS["DirectFeedback, block"], output="head")
    losses = [net(ids, targets)[1] for net in (plain, direct)]

    def pull(loss: Tensor, part: nn.Module) -> Callable[[], Any]:
        parameters = list(part.parameters())
        return lambda: torch.autograd.grad(loss, parameters, retain_graph=True)

    arms = {
        "plain GPT, all blocks": pull(losses[0], plain.blocks),
        "DirectFeedback, block: all, one after the other": pull(losses[1], direct.blocks),
    }
    for number, block in enumerate(direct.blocks):
        arms[f"DirectFeedback, block: block {number} alone"] = pull(losses[1], block)
    return costs(arms, STEPS)


def three_axes() -> str:
    """Say what each library does with (batch, tokens, features)."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    found = ["altprop: works"]
    ap.convert(nn.Linear(4, 5), ap.FeedbackAlignment())(x).sum().backward()
    for name, kind in biotorch_kinds().items():
        try:
            kind(4, 5)(x).sum().backward()
            found.append(f"{name}: works")
        except RuntimeError as error:
            found.append(f"{name}: {str(error).splitlines()[0]}")
    return "; ".join(found)


def table(found: dict[str, Cost], what: str) -> str:
    rows = [[name, *cost.cells()] for name, cost in found.items()]
    return markdown([what, "time (quartiles)", "peak MiB"], rows)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    maps = {f"{i}→{o}, {n} tokens, {r} rounds": linear(i, o, n, r) for i, o, n, r in SIZES}
    step, alone = model_step(), independent_blocks()
    axes = three_axes()
    parts = ["Forward + backward of a linear map, in units of `nn.Linear`."]
    for size, found in maps.items():
        parts += [f"{size}:", table(found, "layer")]
    parts += [
        f"A training step of a GPT of six blocks (width 128, V = 65, 16 × 64 tokens), {STEPS} "
        "rounds, in units of the plain GPT.",
        table(step, "rule"),
        "The backward pass of its blocks, which direct feedback makes independent of each other: "
        "on a processor for each it lasts as long as the slowest alone. In units of the plain "
        "GPT's; peak memory beyond the recorded forward pass.",
        table(alone, "backward pass"),
        f"Input with three axes: {axes}.",
    ]
    results = {"linear": maps, "step": step, "independent blocks": alone}
    data = {
        key: {name: _record(value) for name, value in found.items()}
        for key, found in results.items()
    }
    write("linear_rules", "What a rule costs", parts, {**data, "three axes": axes})


def _record(value: Any) -> Any:
    if isinstance(value, Cost):
        return value._asdict()
    return {name: _record(item) for name, item in value.items()}


if __name__ == "__main__":
    main()
