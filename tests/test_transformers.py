"""Models that nobody here wrote: Hugging Face's GPT-2 and Llama, every rule, its Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import altprop as ap

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours

RULES = [
    ap.Backprop(),
    ap.FeedbackAlignment(),
    ap.SignSymmetry(),
    ap.SignSymmetry(variant="brsf"),
    ap.KolenPollack(),
    ap.WeightMirror(probes=4),
    ap.AlignedFeedback(probes=4),
    ap.DirectFeedback(),
    ap.DirectFeedback(pass_through="pure"),
    ap.DirectFeedback(granularity="block", calibrate_every=5),
    ap.BlockDirectFeedback(),
    ap.GrAPE(),
]


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# every rule on Conv1D's maps, and one of each kind on another's
TRIALS = [(gpt2, rule) for rule in RULES] + [(llama, RULES[i]) for i in (1, 4, 7, 9)]


@pytest.mark.parametrize(("make", "rule"), TRIALS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_trainer_trains_saves_loads_and_generates(make: Any, rule: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    names = {name for name, _ in model.named_parameters()}
    tokens = torch.arange(12) % 8
    rows = [{"input_ids": (tokens + i) % 32, "labels": (tokens + i) % 32} for i in range(16)]
    batch = {"input_ids": torch.stack([r["input_ids"] for r in rows])}
    model.eval()
    before = model(**batch).logits
    ap.convert(model, rule, output="lm_head")
    assert torch.equal(model(**batch).logits, before)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=10, per_device_train_batch_size=4, learning_rate=3e-3,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if "B" in n)
    model.eval()
    want = model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = type(make()).from_pretrained(tmp_path / "saved")
    assert names == {name for name, _ in loaded.named_parameters()}
    ap.convert(loaded, rule, output="lm_head").eval()
    got = loaded.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(got, want)


def test_conv1d_and_linear_feedback_show_in_explain() -> None:
    table = ap.explain(ap.convert(gpt2(), ap.FeedbackAlignment()))
    row = next(r for r in table.rows if r.parameter == "transformer.h.0.attn.c_attn.weight")
    assert (row.rule, row.feedback) == ("FeedbackAlignment", (48, 16))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused_if_reentrant_and_equal_if_not(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, ids = gpt2().train(), torch.arange(12)[None]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ap.convert(model, ap.DirectFeedback(granularity="block"), output="lm_head")
    model(input_ids=ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(ap.RuleError, match="use_reentrant=False"):
            model(input_ids=ids, labels=ids)
    else:
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(torch.allclose(p.grad, want[n]) for n, p in model.named_parameters())
