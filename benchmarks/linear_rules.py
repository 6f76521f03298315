"""Time of forward and backward under each rule against `nn.Linear`, and of a step of block DFA.

Paired: every round runs every arm once, in random order, and an arm's figure is the median over
rounds of its time divided by `nn.Linear`'s in the same round. biotorch, where it is installed
(`pip install --no-deps --target <folder> biotorch`, then that folder on PYTHONPATH), runs beside.
Run: `python benchmarks/linear_rules.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import altprop as ap
from common import markdown, write
from timing import Times, paired, ratio

RULES: dict[str, ap.AbstractRule] = {
    "FeedbackAlignment": ap.FeedbackAlignment(),
    "SignSymmetry": ap.SignSymmetry(),
    "SignSymmetry, brsf": ap.SignSymmetry(variant="brsf"),
    "KolenPollack": ap.KolenPollack(),
    "WeightMirror": ap.WeightMirror(),
    "AlignedFeedback": ap.AlignedFeedback(),
}
SIZES = ((1024, 1024, 4096, 15), (128, 512, 1024, 300), (512, 128, 1024, 300))


def ratios(times: Times, base: str) -> dict[str, float]:
    return {name: ratio(times, name, base).median for name in times}


def biotorch_layers(into: int, out: int) -> dict[str, nn.Module]:
    """Return biotorch's feedback-alignment and sign-symmetry layers, if it can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from biotorch.layers.fa import Linear as Alignment
            from biotorch.layers.usf import Linear as Signs
    except ImportError:
        return {}
    return {"biotorch FA": Alignment(into, out), "biotorch uSF": Signs(into, out)}


def linear(into: int, out: int, tokens: int, rounds: int) -> dict[str, float]:
    """Time forward and backward on (tokens, in): what biotorch can take as well."""
    x = torch.randn(tokens, into, requires_grad=True)
    g = torch.randn(tokens, out)
    layers: dict[str, nn.Module] = {"nn.Linear": nn.Linear(into, out)}
    layers |= {name: ap.convert(nn.Linear(into, out), rule) for name, rule in RULES.items()}
    layers |= biotorch_layers(into, out)

    def step(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            layer.zero_grad()
            x.grad = None
            layer(x).backward(g)

        return run

    return ratios(paired({name: step(m) for name, m in layers.items()}, rounds), "nn.Linear")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, vocabulary: int = 65, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model_step(rounds: int = 30) -> dict[str, float]:
    """Time a training step of six blocks: 65 tokens, width 128, batch 16 × 64."""
    ids = torch.randint(65, (16, 65))
    rules = {
        "backprop": None,
        "DirectFeedback, block": ap.DirectFeedback(granularity="block"),
        "DirectFeedback, block, independent": ap.DirectFeedback("block", feedback="independent"),
        "DirectFeedback, matmul": ap.DirectFeedback(),
        "FeedbackAlignment": ap.FeedbackAlignment(),
    }
    arms: dict[str, Callable[[], None]] = {}
    for name, rule in rules.items():
        net = Model()
        if rule is not None:
            ap.convert(net, rule, output="head")
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

        def run(net: Model = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()

        arms[name] = run
    return ratios(paired(arms, rounds), "backprop")


def three_axes() -> str:
    """Say what each library does with (batch, tokens, features)."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    found = ["altprop: works"]
    ap.convert(nn.Linear(4, 5), ap.FeedbackAlignment())(x).sum().backward()
    for name, layer in biotorch_layers(4, 5).items():
        try:
            layer(x).sum().backward()
            found.append(f"{name}: works")
        except RuntimeError as error:
            found.append(f"{name}: {str(error).splitlines()[0]}")
    return "; ".join(found)


def main() -> None:
    torch.manual_seed(0)
    columns = {f"{i}→{o}, {n} tokens": linear(i, o, n, rounds) for i, o, n, rounds in SIZES}
    names = list(next(iter(columns.values())))
    rows = [[name, *(f"{column[name]:.3f}" for column in columns.values())] for name in names]
    step = model_step()
    data = {"linear": columns, "step": step, "three axes": three_axes()}
    parts = [
        "Median over paired rounds of forward + backward, in units of `nn.Linear`.",
        markdown(["layer", *columns], rows),
        "A training step of six blocks (width 128, V = 65, 16 × 64 tokens), in units of backprop.",
        markdown(["rule", "step"], [[name, f"{value:.3f}"] for name, value in step.items()]),
        f"Input with three axes: {data['three axes']}.",
    ]
    write("linear_rules", "What a rule costs", parts, data)


if __name__ == "__main__":
    main()
