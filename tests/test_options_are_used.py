"""An option changes what comes out, or is refused by name: none is accepted and ignored."""

from __future__ import annotations

import contextlib
import inspect
import io
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import altprop as ap
from altprop.errors import AltpropError
from altprop.lab import checkpoint
from altprop.lab.audit_command import audit
from altprop.lab.data_command import data
from altprop.lab.reference import Rest
from altprop.lab.sample_command import load_run, sample
from altprop.lab.settings import TrainConfig
from altprop.lab.train import train
from altprop.lm.model import Block
from lm_runs import SMALL, curve, sentences, small, tensors, tree

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: it holds two texts."""
    monkeypatch.chdir(tmp_path)
    forward = Block.forward

    def watched(self: Block, h: torch.Tensor) -> torch.Tensor:
        MADE.append(torch.get_num_threads())
        return forward(self, h)

    monkeypatch.setattr(Block, "forward", watched)
    monkeypatch.setattr("altprop.lab.speed.torch.set_num_threads", MADE.append)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: MADE.append(type(self)))
    for name, text in (("text.txt", sentences()), ("other.txt", sentences(300))):
        Path(name).write_text(text, encoding="utf-8")
    return tmp_path


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call gives, or the line with which it refuses."""
    try:
        return call()
    except AltpropError as error:
        return str(error)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


# train: by model, the options with another value, and where it takes more to see one, what more


BOTH: dict[str, Any] = {
    "data": "other.txt",
    "validation": "other.txt",
    "pattern": ("*.py",),
    "tokenizer": "bpe:300",
    "out": Path("elsewhere"),
    "resume": (True, {"there": True}),
    "overwrite": (True, {"there": True}),
    "freeze": ("head.*",),
    "d_model": 32,
    "heads": 4,
    "context": 8,
    "batch": 2,
    "steps": 4,
    "lr": 1e-2,
    "warmup": 0,
    "final_lr": 0.5,
    "weight_decay": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "clip": 1e-3,
    "ema": 0.5,
    "dropout": 0.5,
    "seed": 1,
    "eval_every": 1,
    "save_every": 0.0,
    "eval_windows": 3,
    "final_windows": 2,
    "microbatches": 2,
    "device": "abacus",
    "dtype": "bf16",
    "compile": True,
    "accumulate": 2,
    "threads": 2,
    "parallel": "fsdp",
    "sample": 3,
    "log": ("tensorboard",),
    "quiet": True,
}
EQUILIBRIUM: dict[str, Any] = {
    **BOTH,
    "model": "gpt",
    "block": "damped",
    "layers": 2,
    "stacking": ("separate", {"layers": 2}),
    "estimator": ap.EP(),
    "solver": ap.Anderson(tol=1e-5),
    "stabiliser": None,
    "free_limit": 1e-12,
    "adjoint_limit": 1e-12,
    "error_limit": 1e-12,
    "on_failure": ("stop", {"free_limit": 1e-12}),
    "refused_in_a_row": (2, {"free_limit": 1e-12}),
    # of the other model
    "checkpointing": True,
    "tie_head": True,
    "rule": ap.FeedbackAlignment(),
    "rules": {"*": ap.FeedbackAlignment()},
}
GPT: dict[str, Any] = {
    **BOTH,
    "model": "equilibrium",
    "layers": 2,
    "checkpointing": True,
    "tie_head": True,
    "rule": ap.FeedbackAlignment(),
    "rules": {"blocks.*.mlp.*": ap.FeedbackAlignment()},
    "on_failure": ("stop", {"lr": 1e30}),
    "refused_in_a_row": (2, {"lr": 1e30}),
    # of the other model
    **{name: EQUILIBRIUM[name] for name in ("block", "estimator", "solver", "stabiliser")},
    "stacking": "separate",
    **{name: EQUILIBRIUM[name] for name in ("free_limit", "adjoint_limit", "error_limit")},
}
MODELS = {"equilibrium": (EQUILIBRIUM, {}), "gpt": (GPT, {"model": "gpt", "layers": 1})}
FOREIGN = {
    "equilibrium": {"tie_head", "rule", "rules", "checkpointing"},
    "gpt": {
        "block",
        "stacking",
        "estimator",
        "solver",
        "stabiliser",
        "free_limit",
        "adjoint_limit",
        "error_limit",
    },
}
MADE: list[Any] = []  # threads at the calls of blocks, and what was compiled
WITHOUT: dict[str, Any] = {}  # what came out of a model with nothing changed


def trained(there: bool = False, **options: Any) -> Any:
    """Train, and return all that a run leaves behind but its configuration and the times."""
    base = {**SMALL, "data": "text.txt", "out": Path("run"), "steps": 3, "warmup": 1}
    shutil.rmtree("run", ignore_errors=True)
    if there:
        train(TrainConfig(**base, **{k: v for k, v in options.items() if k in ("model", "layers")}))

    MADE.clear()

    def call() -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            result = train(TrainConfig(**{**base, **options}))
        kept = {"curve": curve(result.folder), "folder": result.folder, "sample": result.sample}
        kept["made"] = list(MADE)  # what costs differ by, of options that change no number
        kept["saves"] = (result.folder / "last.previous.safetensors").exists()
        kept["tracked"] = (result.folder / "tensorboard").exists()
        kept["lines"] = len(said.getvalue().splitlines()) > 1
        return {**kept, "last": tensors(result.folder), "best": tensors(result.folder, "best")}

    return outcome(call)


@pytest.mark.parametrize(
    ("model", "name"), [(m, f.name) for m in MODELS for f in fields(TrainConfig)]
)
def test_every_option_of_train_changes_the_run_or_is_refused(model: str, name: str) -> None:
    changes, base = MODELS[model]
    paired = isinstance(changes[name], tuple) and isinstance(changes[name][-1], dict)
    value, more = changes[name] if paired else (changes[name], {})
    with_it = trained(**{**base, **more, name: value})
    if (key := f"{model} {more}") not in WITHOUT:
        WITHOUT[key] = trained(**base, **more)
    assert not same(with_it, WITHOUT[key]), f"{name}={value!r} was ignored"
    if isinstance(with_it, str):
        assert name in with_it
    else:
        assert name not in FOREIGN[model]


# sample


SAMPLE: dict[str, Any] = {
    "run": Path("b"),
    "prompt": "the ",
    "tokens": 9,
    "temperature": 0.1,
    "top_k": 1,
    "seed": 1,
    "which": "last",
    "device": "abacus",
}


def test_every_option_of_sample_changes_the_text_or_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert SAMPLE.keys() == inspect.signature(sample).parameters.keys()
    for seed, name in enumerate("abc"):
        train(small(Path(name).absolute(), model="gpt", layers=1, lr=3e-2, seed=seed))
    notes = checkpoint.load(Path("a/best.safetensors")).notes
    other, _ = load_run(Path("c"), device="cpu")
    checkpoint.save(Path("a/best.safetensors"), other, None, {}, notes)  # another than the last

    def text(**options: Any) -> Any:
        capsys.readouterr()
        words = {"run": Path("a"), "tokens": 60, **options}
        return outcome(lambda: sample(**words)) or capsys.readouterr().out

    before = text()
    assert before == text()
    assert [name for name, value in SAMPLE.items() if text(**{name: value}) == before] == []


# audit


AUDIT: dict[str, Any] = {
    "data": "other.txt",
    "seeds": 2,
    "seed": 1,
    "rows": ("AEP",),
    "repeats": 1,
    "phase_steps": 1,
    "batch": 1,
    "context": 4,
    "d_model": 16,
    "heads": 2,
    "scale": 0.5,
    "damping": 0.5,
    "model": "other",
    "rules": (ap.FeedbackAlignment(),),
    "layers": 2,
    "steps": 1,
    "json": Path("a.json"),
    "png": Path("a.png"),
}
AUDITED: dict[str, dict[str, Any]] = {
    "equilibrium": {"rows": ("Implicit",), "seeds": 1, "repeats": 0},
    "gpt": {"model": "gpt", "rules": (ap.SignSymmetry(),), "layers": 1},
}
OF_ONE = {
    "equilibrium": {"seeds", "rows", "repeats", "phase_steps", "scale", "damping"},
    "gpt": {"rules", "layers", "steps"},
}


@pytest.mark.parametrize("model", AUDITED)
def test_every_option_of_audit_changes_the_figures_or_is_refused(
    model: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert AUDIT.keys() == inspect.signature(audit).parameters.keys()
    # none of them is a figure that is looked at here, and all take long
    monkeypatch.setattr("altprop.auditing.measure.peak_live_bytes", lambda *_: 0)
    monkeypatch.setattr("altprop.lab.audit_command.relax", lambda trial: Rest(0.0, 0.0, -1.0))
    checked = {
        "relative_error": 0.0,
        "instance": {"batch": 1, "context": 1, "d_model": 1, "heads": 1},
    }
    monkeypatch.setattr("altprop.lab.audit_command.check_reference", lambda *_: checked)
    sizes = {"data": "text.txt", "batch": 2, "context": 8, "d_model": 8, "heads": 1}

    def call(**options: Any) -> Any:
        capsys.readouterr()
        report = audit(**{**sizes, **AUDITED[model], **options})
        files = sorted(path.name for path in here.iterdir())
        if report is None:
            return files, capsys.readouterr().out
        rows = report.as_dict()["rows"]
        return files, [{**row, "milliseconds": row["milliseconds"] is None} for row in rows]

    before = outcome(call)
    assert not isinstance(before, str)
    for name, value in AUDIT.items():
        value = {"equilibrium": "gpt", "gpt": "equilibrium"}[model] if name == "model" else value
        with_it = outcome(lambda name=name, value=value: call(**{name: value}))
        assert with_it != before, f"{name}={value!r} was ignored"
        foreign = any(name in names for other, names in OF_ONE.items() if other != model)
        assert isinstance(with_it, str) == (foreign or name == "model"), with_it
        assert not isinstance(with_it, str) or name in with_it
        for path in ("a.json", "a.png"):
            Path(path).unlink(missing_ok=True)


# data


DATA: dict[str, Any] = {
    "corpus": "other.txt",
    "validation": "other.txt",
    "pattern": ("*.py",),
    "tokenizer": "bpe:300",
    "out": Path("out"),
    "overwrite": True,
}


def test_every_option_of_data_changes_what_it_does_or_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert DATA.keys() == inspect.signature(data).parameters.keys()
    for before in ({}, {"corpus": "text.txt"}):

        def call(before: dict[str, Any] = before, **options: Any) -> Any:
            capsys.readouterr()
            data(**{**before, **options})
            return capsys.readouterr().out, sorted(tree(here))

        plain = outcome(call)
        for name, value in DATA.items():
            assert outcome(lambda name=name, value=value: call(**{name: value})) != plain, name
