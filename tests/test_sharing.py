"""A converted model in a folder: whoever reads it gets the same outputs and the same gradients."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

import altprop as ap
from altprop.sharing.values import read, written
from altprop.testing.rules import TinyModel
from conversions import TOKENS, assert_equal, assert_same_model, gradients, tiny
from lm_runs import small, tree

RULES: list[Any] = [
    ap.FeedbackAlignment(init="orthogonal", std=0.1),
    ap.SignSymmetry(),
    ap.SignSymmetry(variant="brsf"),
    ap.KolenPollack(),
    ap.WeightMirror(probes=4),
    ap.AlignedFeedback(probes=4),
    ap.DirectFeedback(calibrate_every=3),
    ap.DirectFeedback(granularity="block"),
    ap.BlockDirectFeedback(),
    ap.GrAPE(),
    {"blocks": ap.AEP(tol=1e-6)},
    {"blocks.0": ap.BlockDirectFeedback(), "head": ap.FeedbackAlignment(), "*": ap.Backprop()},
]


def untouched() -> TinyModel:
    """Return a tiny model with other weights than `tiny` has."""
    torch.manual_seed(7)
    return TinyModel(tied=False).double()


def learned(rule: Any, steps: int = 2) -> TinyModel:
    """Return a model that has learned by a rule for some steps, its feedback too."""
    model = ap.convert(tiny(), rule, output="head", seed=3, batch_axis=_axis(rule))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        model(TOKENS)[0].tanh().square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def _axis(rule: Any) -> int | None:
    values = rule.values() if isinstance(rule, dict) else [rule]
    return 0 if any(isinstance(value, ap.AbstractBroadcast) for value in values) else None


@pytest.mark.parametrize("feedback", ["stored", "drawn"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_is_read_back_computes_and_learns_the_same(
    rule: Any, feedback: Any, tmp_path: Path
) -> None:
    model = learned(rule)
    before = pickle.dumps(model.state_dict())
    folder = ap.save_pretrained(model, tmp_path / "shared", feedback=feedback)
    assert pickle.dumps(model.state_dict()) == before
    again = ap.from_pretrained(folder, untouched())
    assert str(ap.explain(again)) == str(ap.explain(model))
    for _ in range(2):  # the second of a rule that draws or measures at every pass, too
        assert_equal(gradients(again, TOKENS), gradients(model, TOKENS), tol=0)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    # the weights are a plain model's, for whoever has no altprop
    plain = untouched()
    load_model(plain, folder / "model.safetensors")
    assert_same_model(plain, ap.revert(copy.deepcopy(model)))


def test_drawn_feedback_is_left_out_and_learned_feedback_is_not(tmp_path: Path) -> None:
    fixed = ap.save_pretrained(learned(ap.FeedbackAlignment()), tmp_path / "a", feedback="drawn")
    assert not (fixed / "feedback.safetensors").exists()
    model = learned(ap.KolenPollack())
    moved = ap.save_pretrained(model, tmp_path / "b", feedback="drawn")
    assert load_file(moved / "feedback.safetensors").keys() == {
        name for name in model.state_dict() if name.endswith(".B")
    }


def test_a_part_that_was_reverted_stays_so(tmp_path: Path) -> None:
    model = learned(ap.FeedbackAlignment())
    ap.revert(model.blocks[0])
    again = ap.from_pretrained(ap.save_pretrained(model, tmp_path / "a"), untouched())
    assert str(ap.explain(again)) == str(ap.explain(model))
    assert_equal(gradients(again, TOKENS), gradients(model, TOKENS), tol=0)
    ap.convert(model.blocks[0], ap.SignSymmetry())
    with pytest.raises(ap.RuleError, match="blocks.0 was converted again inside a converted"):
        ap.save_pretrained(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_parts_that_were_converted_each_for_itself_are_so_again(tmp_path: Path) -> None:
    model = tiny()
    ap.convert(model.blocks[0], ap.FeedbackAlignment(), seed=1)
    ap.convert(model.head, ap.SignSymmetry())
    again = ap.from_pretrained(ap.save_pretrained(model, tmp_path / "a"), untouched())
    assert_equal(gradients(again, TOKENS), gradients(model, TOKENS), tol=0)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> TinyModel:
        return TinyModel(tied=True).double()

    model = ap.convert(tied(), ap.FeedbackAlignment())
    folder = ap.save_pretrained(model, tmp_path / "a")
    shared = {
        n for n, v in model.state_dict().items() if v.data_ptr() == model.head.weight.data_ptr()
    }
    assert len(shared) == 2 and len(shared & load_file(folder / "model.safetensors").keys()) == 1
    again = ap.from_pretrained(folder, tied())
    assert again.head.weight is again.embed.weight
    load_model(tied(), folder / "model.safetensors")


def test_a_reverted_folder_is_a_plain_models(tmp_path: Path) -> None:
    model = learned(ap.KolenPollack())
    folder = ap.save_pretrained(model, tmp_path / "a")
    ap.save_pretrained(model, tmp_path / "a", revert=True)  # in the place of the other
    assert sorted(tree(folder)) == ["README.md", "model.safetensors"]
    assert ap.explain(model)  # itself it is as it was
    with pytest.raises(ap.CheckpointError, match=r"holds no rules\.json: .*load_model\(model"):
        ap.from_pretrained(folder, untouched())
    assert "plain model again" in (folder / "README.md").read_text()


# What is refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ap.save_pretrained(learned(ap.FeedbackAlignment()), tmp_path / "shared")


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "rules.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


CALL = {"path": "", "output": None, "seed": 0, "solver": None, "on_failure": None}
FA_RULE = {"class": "FeedbackAlignment", "values": {}}
DEEP = {**CALL, "rule": FA_RULE, "batch_axis": None}


def header(path: Path, aliases: Any) -> None:
    save_file(load_file(path), path, {"format": "pt", "aliases": json.dumps(aliases)})


def instead(path: Path, make: Any) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, tuple[Any, str]] = {
    "a fifo of rules": (lambda f: instead(f / "rules.json", os.mkfifo), "holds no rules.json"),
    "a fifo of weights": (
        lambda f: instead(f / "model.safetensors", os.mkfifo),
        "it is a fifo, expected a regular file",
    ),
    "a fifo of feedback": (
        lambda f: instead(f / "feedback.safetensors", os.mkfifo),
        "it is a fifo, expected a regular file",
    ),
    "rules that cannot be read": (
        lambda f: instead(f / "rules.json", lambda p: p.symlink_to("/proc/self/mem")),
        "cannot read .*Input/output error",
    ),
    "aliases": (lambda f: header(f / "model.safetensors", {"x": 7}), "aliases.x is 7, expected a"),
    "half a character": (
        lambda f: header(f / "model.safetensors", {"\ud800": "head.weight"}),
        "no weights .*surrogates not allowed",
    ),
    "calls": (lambda f: rewrite(f, calls=[7]), r"calls\[0\] is 7, expected a mapping"),
    "places": (lambda f: rewrite(f, places=[7]), r"places\[0\] is 7, expected a text"),
    "a place of two lines": (lambda f: rewrite(f, places=["a\nb"]), r"stand at a\\nb, and here"),
    "output": (lambda f: rewrite(f, calls=[{**DEEP, "output": 7}]), "output is 7, expected a text"),
    "axes": (lambda f: rewrite(f, calls=[{**DEEP, "batch_axis": [1]}]), "batch_axis has 1 values"),
    "two problems": (lambda f: rewrite(f, calls=[DEEP, DEEP]), "cannot convert this TinyModel; .*"),
    "a value of another type": (
        lambda f: rewrite(f, calls=[{**DEEP, "rule": {**FA_RULE, "values": {"std": "0.02"}}}]),
        "the values of FeedbackAlignment do not fit it: std is '0.02', expected float",
    ),
    "no rules": (lambda f: (f / "rules.json").unlink(), "holds no rules.json"),
    "no json": (lambda f: (f / "rules.json").write_text("{"), "damaged or not altprop's"),
    "deep": (lambda f: (f / "rules.json").write_text("[" * 99), "damaged or not altprop's"),
    "other format": (lambda f: rewrite(f, format="x"), "damaged or not altprop's: expected"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot read|truncated"),
    "a bit": (lambda f: flip(f / "model.safetensors"), "is not what was written there"),
    "a bit of feedback": (lambda f: flip(f / "feedback.safetensors"), "is not what it was"),
    "no feedback": (lambda f: (f / "feedback.safetensors").write_bytes(b"x"), "truncated"),
    "other feedback": (lambda f: rewrite(f, feedback={}), "feedback is of another model"),
    "other places": (lambda f: rewrite(f, places=["head"]), "its rules stand at head, and here"),
    "no such rule": (
        lambda f: rewrite(
            f, calls=[{**CALL, "rule": {"class": "Exec", "values": {}}, "batch_axis": None}]
        ),
        "unknown rule 'Exec'",
    ),
    "no such value": (
        lambda f: rewrite(
            f,
            calls=[
                {
                    **CALL,
                    "rule": {"class": "FeedbackAlignment", "values": {"x": 1}},
                    "batch_axis": None,
                }
            ],
        ),
        "the values of FeedbackAlignment do not fit it",
    ),
    "a rule of nothing": (
        lambda f: rewrite(f, calls=[{**CALL, "rule": 3}]),
        "call of convert is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_leaves_a_plain_model(damage: str, folder: Path) -> None:
    harm, said = DAMAGES[damage]
    harm(folder)
    model = untouched()
    with pytest.raises(ap.AltpropError, match=said) as error:
        ap.from_pretrained(folder, model)
    assert "\n" not in str(error.value)
    assert {type(m) for m in model.modules()} == {type(m) for m in untouched().modules()}
    assert model.state_dict().keys() == untouched().state_dict().keys()


def test_another_model_is_refused_untouched(folder: Path) -> None:
    other = TinyModel(tied=False)  # in float32
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ap.CheckpointError, match="is of another model: it differs in"):
        ap.from_pretrained(folder, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ap.RuleError, match="converted already"):
        ap.from_pretrained(folder, ap.convert(untouched(), ap.SignSymmetry()))
    with pytest.raises(ap.ConfigError, match="Linear has no from_pretrained"):
        ap.from_pretrained(folder, nn.Linear)  # type: ignore[type-var]


def test_what_cannot_be_shared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ap.RuleError, match="was not converted"):
        ap.save_pretrained(tiny(), tmp_path / "a")
    model = learned(ap.FeedbackAlignment())
    with pytest.raises(ap.ConfigError, match="unknown feedback 'none'"):
        ap.save_pretrained(model, tmp_path / "a", feedback="none")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ap.CheckpointError, match="cannot be written"):
        ap.save_pretrained(model, tmp_path / "file")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    with pytest.raises(ap.CheckpointError, match="is somebody's own: move it, or leave it by card"):
        ap.save_pretrained(model, mine)
    assert tree(mine) == {"README.md": b"mine"}
    ap.save_pretrained(model, mine, card=False)
    assert (mine / "README.md").read_text() == "mine"


# Rules as data


VALUES = [
    *RULES,
    ap.Scattered(ap.Fallback((ap.Anderson(), ap.GMRES(restart=3))), starts=2),
    ap.DyadicEP(solver=ap.Euler(step=0.5)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:40])
def test_a_rule_is_the_same_after_json(value: Any) -> None:
    assert repr(read(json.loads(json.dumps(written(value))))) == repr(value)


def test_a_rule_of_ones_own_is_found_by_its_name_and_one_of_odd_parts_refused() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Halved(ap.AbstractTransport):
        part: Any = 0.5

        def matrix(self, W: Tensor, B: Tensor | None, noise: Tensor | None) -> Tensor:
            return W * self.part

    assert read(written(Halved(0.25))) == Halved(0.25)
    for odd in (print, float("nan"), b"x"):
        with pytest.raises(ap.ConfigError, match="cannot be written as JSON"):
            written(Halved(odd))


# The card


def test_the_card_shows_the_audits_figures(tmp_path: Path) -> None:
    model = learned(ap.FeedbackAlignment(std=0.1), steps=0)
    trial = ap.Trial(model, lambda: model(TOKENS)[0].tanh().square().sum(), "tokens")
    report = ap.audit_trials(
        [trial], [ap.Installed()], ap.Installed(exact=True, name="backprop"), repeats=0
    )
    folder = ap.save_pretrained(model, tmp_path / "a", audit=report)
    card = (folder / "README.md").read_text()
    row = report.rows[0]
    cosine = f"{int(row.mean('cosine').mean * 1e5) / 1e5:.5f}"
    assert card.startswith("---\ntags: [altprop]\n---\n") and f"| {cosine} |" in card
    assert "| `all that fit` | `FeedbackAlignment(init='gaussian', std=0.1, k=None)` | 3 |" in card
    size = sum(p.numel() for p in untouched().parameters())
    assert f"A `TinyModel` of {size:,} parameters" in card
    assert "How good" not in (ap.save_pretrained(model, tmp_path / "b") / "README.md").read_text()


# Hugging Face's models


def test_a_transformers_model_is_read_by_its_own_library_and_by_altprop(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="its models need the extra hf")
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    kind, ids = transformers.GPT2LMHeadModel, TOKENS

    def grads(model: Any) -> dict[str, Tensor]:
        model.eval().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = ap.convert(kind(config), ap.KolenPollack())
    folder = ap.save_pretrained(model, tmp_path / "a")
    with warnings.catch_warnings():  # of keys that it does not know: there are none
        warnings.simplefilter("error", UserWarning)
        plain = kind.from_pretrained(folder)
    assert type(plain) is kind and torch.equal(
        plain.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    )
    want = grads(model)
    assert_equal(grads(ap.from_pretrained(folder, plain)), want, tol=0)
    auto = transformers.AutoModelForCausalLM
    assert_equal(grads(ap.from_pretrained(folder, auto)), want, tol=0)
    with pytest.raises(ap.CheckpointError, match="load it by its own from_pretrained"):
        ap.from_pretrained(folder, kind(config))
    ap.save_pretrained(model, tmp_path / "b", revert=True)
    assert not (tmp_path / "b" / "rules.json").exists()
    assert type(auto.from_pretrained(tmp_path / "b")) is kind


# Runs


def test_a_run_is_loaded_as_it_was_kept(tmp_path: Path) -> None:
    from altprop.lab.sample_command import load_run
    from altprop.lab.train import train

    given = small(tmp_path / "run", model="gpt", layers=1, rule=ap.FeedbackAlignment(), steps=4)
    train(given)
    run = ap.load(tmp_path / "run")
    best, tokenizer = load_run(tmp_path / "run", device="cpu")
    assert isinstance(run, ap.LoadedRun) and not run.model.training
    assert run.tokenizer == tokenizer and run.config.rule == given.rule
    assert all(torch.equal(v, best.state_dict()[n]) for n, v in run.model.state_dict().items())
    shutil.copy(tmp_path / "run" / "best.safetensors", tmp_path / "best")
    (tmp_path / "run" / "best.safetensors").unlink()
    with pytest.raises(ap.CheckpointError, match="kept last alone"):
        ap.load(tmp_path / "run")
    assert ap.load(tmp_path / "run", which="last").folder == tmp_path / "run"
    with pytest.raises(ap.CheckpointError, match="give the folder of a training run"):
        ap.load(tmp_path)
    shared = ap.save_pretrained(run.model, tmp_path / "shared")
    from dataclasses import replace

    from altprop.lab.building import build_model

    plain = build_model(replace(run.config, rule=None), len(tokenizer))
    assert str(ap.explain(ap.from_pretrained(shared, plain))) == str(ap.explain(run.model))
