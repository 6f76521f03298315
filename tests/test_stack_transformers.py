"""Hugging Face's own models by AEP: optional, where transformers is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from systems import cosine

transformers = pytest.importorskip("transformers")


def gpt2(dropout: float) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=3, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "stack"),
    [
        (lambda: gpt2(0.0), "transformer.h"),
        (lambda: gpt2(0.2), "transformer.h"),
        (llama, "model.layers"),
    ],
    ids=["gpt2", "gpt2 with dropout", "llama"],
)
def test_a_hugging_face_model_keeps_its_logits_and_gets_backprops_gradient(
    make: object, stack: str
) -> None:
    torch.manual_seed(0)
    model = make().train()  # type: ignore[operator]
    ids = torch.randint(17, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padding on the left

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        return out.logits.detach(), {
            k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None
        }

    wanted_logits, wanted = run()
    ap.convert(model, {stack: ap.AEP()})
    logits, got = run()
    assert torch.equal(logits, wanted_logits) and got.keys() == wanted.keys()
    biggest = max(float(g.norm()) for g in wanted.values())
    for name, g in wanted.items():
        if float(g.norm()) > 1e-5 * biggest:  # a key's bias has no gradient but round-off
            assert cosine(got[name], g) >= 0.999, name
    model.eval()
    written = model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)  # with its caches
    assert written.shape == (1, 7)
