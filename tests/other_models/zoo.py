"""Models that other people build, tiny and in float64, and how each of them is fed.

A `Case` hides what differs between them: where samples and tokens lie, where the logits are made,
which blocks form a stack, and which maps a rule cannot have.
Shapes: N samples, T tokens, S tokens of a memory, C features, V classes.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import altprop as ap

C, V = 8, 7
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
        return copy.deepcopy(_made(self.name))

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
        with warnings.catch_warnings():  # of a convolution, which no rule is for
            warnings.filterwarnings("ignore", ".*(C|c)onv")
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
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return in_double(BY_NAME[name].make())


def in_double(model: nn.Module) -> nn.Module:
    """Return a model in float64, without the norms that round to float32 on their way."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double().train()


def tokens(
    N: int, T: int, S: int | None = None, *, time_first: bool = False, name: str = "tokens",
    memory: str = "memory", pad: str | None = None, keep: int = 0, pooled: bool = False,
) -> Batch:  # fmt: skip
    """Draw token inputs.

    **Arguments:** `S`, how many tokens the input `memory` gets; `pad`, the name of a mask (N, T)
    under which the first sample lacks its last token; `keep`, what the mask has at the others;
    `pooled`, whether a sample has one target and not one for each token.
    """
    g = torch.Generator().manual_seed(1)
    inputs = {name: torch.randint(1, V, (N, T), generator=g)}
    if S is not None:
        inputs[memory] = torch.randint(1, V, (N, S), generator=g)
    targets = torch.randint(V, (N,) if pooled else (N, T), generator=g)
    if time_first:
        inputs = {k: v.t().contiguous() for k, v in inputs.items()}
    axes = dict.fromkeys(inputs, 1) if time_first else {}
    if pad is not None:
        inputs[pad] = torch.full((N, T), keep, dtype=torch.int64 if keep else torch.bool)
        inputs[pad][0, -1] = 1 - keep
    return Batch(inputs, axes, targets, _weights(N))


def _weights(N: int) -> Tensor:
    return torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64)[:N]


def reals(*shape: int, name: str = "x") -> Batch:
    """Draw real inputs, samples first, with one target for each."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=g).double()
    return Batch({name: x}, {}, torch.randint(3, shape[:1], generator=g), _weights(shape[0]))


class Encoder(nn.Module):
    """torch's own encoder under an embedding and a head, of each token or of their mean."""

    def __init__(self, pooled: bool = False, **options: Any) -> None:
        super().__init__()
        self.pooled = int(options["batch_first"]) if pooled else None
        self.embed = nn.Embedding(V, C)
        layer = nn.TransformerEncoderLayer(C, 2, 12, dropout=0.0, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(C, V)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        h = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.head(h if self.pooled is None else h.mean(self.pooled))


class Decoder(nn.Module):
    """torch's own causal decoder that attends to an embedded memory."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.time_axis = int(options["batch_first"])
        self.embed = nn.Embedding(V, C)
        layer = nn.TransformerDecoderLayer(C, 2, 12, dropout=0.0, **options)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(C, V)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(tokens)
        T = x.shape[self.time_axis]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.head(self.decoder(x, self.embed(memory), mask, tgt_is_causal=True))


class MLP(nn.Module):
    """Blocks of a linear map and an activation, and a head."""

    def __init__(self, depth: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(C, C), activation()) for _ in range(depth))
        )
        self.head = nn.Linear(C, 3)
        for block in self.blocks:
            nn.init.normal_(block[0].weight, std=(2 / C) ** 0.5)
            nn.init.normal_(block[0].bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def weight_normed(model: nn.Module) -> nn.Module:
    for block in model.blocks[:2]:
        parametrizations.weight_norm(block[0])
    return model


def _hf(name: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def gpt2() -> nn.Module:
    return _hf(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_positions=8, n_embd=C, n_layer=2,
        n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip


def llama() -> nn.Module:
    return _hf(
        "LlamaForCausalLM", "LlamaConfig", vocab_size=V, hidden_size=C, intermediate_size=12,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=8, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip


def bert() -> nn.Module:
    return _hf(
        "BertForMaskedLM", "BertConfig", vocab_size=V, hidden_size=C, intermediate_size=12,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip


def t5() -> nn.Module:
    return _hf(
        "T5ForConditionalGeneration", "T5Config", vocab_size=V, d_model=C, d_kv=4, d_ff=12,
        num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, relative_attention_num_buckets=4,
    )  # fmt: skip


def vit() -> nn.Module:
    return _hf(
        "ViTForImageClassification", "ViTConfig", hidden_size=C, intermediate_size=12,
        num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2, num_channels=2,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )  # fmt: skip


def lora(model: nn.Module) -> nn.Module:
    """Return GPT-2 with adapters that are not zero; all else is frozen."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True,
        init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(model, config).double().train()


def _encoder(time_first: bool, norm_first: bool, T: int, pooled: bool = False) -> Case:
    options = {"batch_first": not time_first, "norm_first": norm_first, "pooled": pooled}
    layout = "time first" if time_first else "batch first"
    return Case(
        f"encoder, {layout}{', pooled' * pooled}{', square' * (T == 3)}",
        lambda: Encoder(**options, activation=F.gelu),
        lambda: tokens(3, T, time_first=time_first, pad="padding", pooled=pooled),
        "head",
        ("encoder.layers",),
        time_first,
        top=None if norm_first or pooled else "encoder.layers.1",
        entry="embed",
    )


def _decoder(time_first: bool, norm_first: bool) -> Case:
    options = {"batch_first": not time_first, "norm_first": norm_first}
    return Case(
        f"decoder, {'time first' if time_first else 'batch first'}",
        lambda: Decoder(**options, activation=F.gelu),
        lambda: tokens(3, 4, 5, time_first=time_first),
        "head",
        ("decoder.layers",),
        time_first,
        blocks="decoder.layers.*",
        elsewhere=("decoder.layers.*.multihead_attn",),
        top=None if norm_first else "decoder.layers.1",
        entry="embed",
    )


GPT2 = Case(
    "gpt2", gpt2, lambda: tokens(3, 4, name="input_ids"), "lm_head", ("transformer.h",),
    entry="transformer.wte", pretrained=True,
)  # fmt: skip

CASES = [
    _encoder(time_first=False, norm_first=False, T=4),
    _encoder(time_first=True, norm_first=True, T=3),
    _encoder(time_first=True, norm_first=False, T=3, pooled=True),
    _decoder(time_first=False, norm_first=True),
    _decoder(time_first=True, norm_first=False),
    GPT2,
    Case(
        "llama", llama, lambda: tokens(3, 4, name="input_ids"), "lm_head", ("model.layers",),
        entry="model.embed_tokens", pretrained=True,
    ),
    Case(
        "bert", bert, lambda: tokens(3, 4, name="input_ids", pad="attention_mask", keep=1),
        "cls.predictions.decoder", ("bert.encoder.layer",),
        entry="bert.embeddings.word_embeddings", pretrained=True,
    ),
    Case(
        "t5", t5, lambda: tokens(3, 4, 5, name="decoder_input_ids", memory="input_ids"),
        "lm_head", ("encoder.block", "decoder.block"), blocks="decoder.block.*",
        elsewhere=("encoder", "decoder.block.*.EncDecAttention.[kv]"), entry="shared",
        pretrained=True,
    ),
    Case(
        "vit", vit, lambda: reals(3, 2, 4, 4, name="pixel_values"), "classifier", ("vit.layers",),
        pretrained=True,
    ),
    replace(
        GPT2, name="lora, then convert", make=lambda: lora(gpt2()),
        output="base_model.model.lm_head", stacks=("base_model.model.transformer.h",),
        entry="base_model.model.transformer.wte", pretrained=False,
    ),
    replace(
        GPT2, name="convert, then lora", after=lora, inside="base_model.model",
        entry="base_model.model.transformer.wte", pretrained=False,
    ),
    Case(
        "weight norm, then convert", lambda: weight_normed(MLP(3, nn.Tanh)), lambda: reals(4, C),
        "head", ("blocks",), blocks="blocks.*", foreign=("blocks.0", "blocks.1"), top="blocks.2",
    ),
    Case(
        "convert, then weight norm", lambda: MLP(3, nn.Tanh), lambda: reals(4, C), "head",
        ("blocks",), after=weight_normed, top="blocks.2",
    ),
    Case(
        "relu mlp", lambda: MLP(20, nn.ReLU), lambda: reals(4, C), "head", ("blocks",),
        top="blocks.19",
    ),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
ALL = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(", ", "-"))

TRANSPORTS = [
    ap.Backprop(),
    ap.FeedbackAlignment(std=0.3),
    ap.SignSymmetry(),
    ap.KolenPollack(std=0.3),
    ap.WeightMirror(probes=4, std=0.3),
    ap.AlignedFeedback(probes=4, std=0.3),
]
BROADCASTS = [
    ap.DirectFeedback(std=0.3),
    ap.DirectFeedback(error="head_input", feedback="independent", pass_through="pure", std=0.3),
    ap.DirectFeedback("block", std=0.3),
    ap.BlockDirectFeedback(std=0.3),
    ap.GrAPE(every=50, std=0.3),
]
RULES = TRANSPORTS + BROADCASTS


def named(rule: Any) -> str:
    """Return the rule's name and what it does not have by default, for a test's name."""
    plain = type(rule)()
    changed = [
        str(v) for k, v in vars(rule).items() if v != getattr(plain, k) and k not in ("std",)
    ]
    return " ".join([type(rule).__name__, *changed])
