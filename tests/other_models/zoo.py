"""Models that other people build, tiny and in float64, how they are fed, and the rules they get.

Shapes: N samples, T tokens, S tokens of a memory, C features, V classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Batch, Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import altprop as ap

C, V = 8, 7


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
