"""What the tests of other people's models share: a `Case`, and how two gradients compare.

A `Case` hides what differs between models: where samples and tokens lie, where the logits are made,
which blocks form a stack, and which maps a rule cannot have.
Shapes: N samples, T tokens, V classes.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import altprop as ap

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class Batch:
    """What a model is fed, and each sample's targets and weight in the loss."""

    inputs: dict[str, Tensor]
    axes: dict[str, int]
    """The axis of an input that tells samples apart, where that is not the first."""
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def sample(self, n: int) -> Batch:
        inputs = {k: v.narrow(self.axes.get(k, 0), n, 1) for k, v in self.inputs.items()}
        rows = slice(n, n + 1)
        return Batch(inputs, self.axes, self.targets[rows], self.weights[rows])


@dataclass(frozen=True)
class Case:
    """One model: how it is made and fed, and where rules can go in it."""

    name: str
    make: Callable[[], nn.Module]
    feed: Callable[[], Batch]
    output: str
    stacks: tuple[str, ...] = ()
    """The stacks of blocks that can become a layered equilibrium."""
    time_first: bool = False
    blocks: str | None = None
    """The blocks, where they are not the outermost lists of modules."""
    foreign: tuple[str, ...] = ()
    """Maps whose forward no rule knows."""
    elsewhere: tuple[str, ...] = ()
    """Maps of tokens that are not those of the error: no direct feedback can pair the two."""
    top: str | None = None
    """The block whose output is the head's input, if no norm lies between."""
    entry: str | None = None
    """The module that makes the first activations, where the input is no real numbers."""
    after: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    """What is done to the model once it is converted."""
    inside: str = ""
    """The path, from then on, of the model that was converted."""
    pretrained: bool = False

    def base(self) -> nn.Module:
        """Return the model as it is before anything is done to it."""
        return copy.deepcopy(_made(self.make))

    def plain(self) -> nn.Module:
        """Return the model without any rule."""
        return self.finish(self.base())

    def finish(self, model: nn.Module) -> nn.Module:
        """Do what is done to the model after it was converted."""
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.after(model)

    def patterns(self, rule: ap.AbstractRule) -> Mapping[str, ap.AbstractRule]:
        """Return where a rule goes: everywhere that it can be right."""
        maps, broadcast = "maps" in rule.takes, isinstance(rule, ap.AbstractBroadcast)
        cut = broadcast and not maps and not isinstance(rule, ap.BlockDirectFeedback)
        kept = () if cut else self.foreign + (self.elsewhere if broadcast else ())
        return {**{p: ap.Backprop() for p in kept}, "*" if maps else self.blocks or "*": rule}

    def convert(self, rule: ap.AbstractRule, seed: int = 0) -> nn.Module:
        patterns = self.patterns(rule)
        chosen = rule if list(patterns) == ["*"] else patterns
        return self.finish(self.converted(chosen, seed))

    def converted(self, rule: Any, seed: int = 0) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*patch_embeddings", ap.RuleWarning)  # a convolution
            return ap.convert(self.base(), rule, output=self.output, seed=seed)

    def output_module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(f"{self.inside}.{self.output}".lstrip("."))

    def batch(self) -> Batch:
        return self.feed()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits with samples first, (N, ..., V)."""
        out = model(**batch.inputs)
        logits = out if isinstance(out, Tensor) else out.logits
        return logits.transpose(0, 1) if self.time_first and logits.dim() == 3 else logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy, summed over tokens and, weighted, over samples."""
        logits = self.logits(model, batch)
        each = F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), reduction="none")
        return (each.view(len(batch), -1).sum(1) * batch.weights).sum()

    def gradients(self, model: nn.Module, batch: Batch | None = None) -> Gradients:
        """Return what one backward pass writes into every parameter."""
        model.zero_grad()
        self.loss(model, self.batch() if batch is None else batch).backward()
        return written(model)

    @functools.cached_property
    def reference(self) -> nn.Module:
        """A model without any rule, for tests that leave it as it is."""
        return self.plain()

    @functools.cached_property
    def backprop(self) -> Gradients:
        return self.gradients(self.reference)

    @functools.cache  # noqa: B019 (a handful of tiny models, for as long as the tests run)
    def trained(self, rule: ap.AbstractRule) -> tuple[nn.Module, Gradients]:
        """Return a converted model and its gradients, for tests that leave it as it is."""
        model = self.convert(rule)
        return model, self.gradients(model)

    def assert_plain(self, model: nn.Module) -> None:
        """Assert that a model is, to the bit and to the last attribute, one without any rule."""
        plain, batch = self.reference, self.batch()
        assert list(model.state_dict()) == list(plain.state_dict())
        pairs = list(zip(model.modules(), plain.modules(), strict=True))
        for got, wanted in pairs:
            assert ancestors(got) == ancestors(wanted)
            assert got.__dict__.keys() == wanted.__dict__.keys()
            assert got.training == wanted.training
        assert torch.equal(self.logits(model, batch), self.logits(plain, batch))
        assert distance(self.gradients(model), self.backprop) == 0.0


def ancestors(module: nn.Module) -> list[Any]:
    """Return a module's classes; of a parametrised one, whose class is its own, the names."""
    own = parametrize.is_parametrized(module)
    return [kind.__qualname__ if own else kind for kind in type(module).__mro__]


def written(model: nn.Module) -> Gradients:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


PROBED = (ap.WeightMirror, ap.AlignedFeedback, ap.GrAPE)
"""Rules whose feedback learns from noise, drawn by seed and pass."""


def without_noise(model: nn.Module, rule: ap.AbstractRule, gradients: Gradients) -> Gradients:
    """Leave out the gradients of feedback where they depend on seed and pass."""
    own = {id(p) for p in ap.feedback_parameters(model)} if isinstance(rule, PROBED) else set()
    named = model.named_parameters()
    return {name: gradients[name] for name, p in named if id(p) not in own}


def distance(got: Gradients, wanted: Gradients) -> float:
    """Return the worst relative error over parameters; of zeros, relative to the largest."""
    missing = [n for n, g in wanted.items() if (got[n] is None) != (g is None)]
    assert not missing, f"in one of the two there is no gradient of {missing}"
    pairs = {n: (got[n], g) for n, g in wanted.items() if g is not None}
    floor = 1e-6 * max(float(g.norm()) for _, g in pairs.values())
    return max(float((a - b).norm() / (b.norm() + floor)) for a, b in pairs.values())


@functools.cache
def _made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return in_double(make())


def in_double(model: nn.Module) -> nn.Module:
    """Return a model in float64, without the norms that round to float32 on their way."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double().train()
