"""The command `altprop audit`: every estimator's gradient beside an exact one, on one problem."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from altprop import AbstractRule, AuditReport, ConfigError, Trial, audit_trials
from altprop.errors import unknown
from altprop.lab.audit_gpt import audit_gpt
from altprop.lab.choices import defaults_of
from altprop.lab.display import counting
from altprop.lab.memory import FLOAT, MATRICES, check_memory
from altprop.lab.record import versions
from altprop.lab.reference import (
    CHECKS,
    REFERENCE,
    RELAXATION,
    Rest,
    Sizes,
    check_reference,
    make_arms,
    make_trial,
    relax,
)
from altprop.lab.settings import TrainConfig
from altprop.lab.values import plain
from altprop.lm.text import Corpus, describe, load_corpus
from altprop.terminal import printable

# what only one of the audits has, so that an option of the other is refused and not ignored
_OWN = {
    "equilibrium": ("seeds", "rows", "repeats", "phase_steps", "scale", "damping"),
    "gpt": ("rules", "layers", "steps"),
}
FINITE_DIFFERENCES = 1e-6  # the relative error up to which the reference counts as confirmed


def audit(
    *,
    data: str = "plays",
    seeds: int = 3,
    seed: int = 0,
    rows: tuple[str, ...] | None = None,
    repeats: int = 3,
    phase_steps: int = 100,
    batch: int = 16,
    context: int = 64,
    d_model: int = 128,
    heads: int = 4,
    scale: float = 1.0,
    damping: float = 1.0,
    model: str = "equilibrium",
    rules: tuple[AbstractRule, ...] = (),
    layers: int = 4,
    steps: int = 0,
    json: Path | None = None,
    png: Path | None = None,
) -> AuditReport:
    """Compare the gradients of learning rules with an exact one.

    With `--model gpt` the `--rules` are compared with backprop on a GPT, layer by layer, at its
    initialisation and, with `--steps N`, while each rule trains a GPT of its own.

    Otherwise the problem is the field's: damped attention, with the force
    F = -(z - x) + scale (Attn(z) - damping z), on windows of text, under a fixed random embedding
    and head; the reference is backpropagation through 120 Euler steps of its relaxation. One seed
    draws weights, embedding, head and batch.

    Args:
        data: Name of a corpus, a UTF-8 text file, a folder of them, or a prepared folder.
        seeds: Number of seeds; the figures are means over them.
        seed: The first seed; the others follow it.
        rows: The rows to compute, such as AEP,Implicit; without it (or null), all of them.
        repeats: How often each row is timed, in turn with the others, on the first seed; 0: never.
        phase_steps: Limit of evaluations of a nudged or adjoint solve of the rows not "published".
        batch: Windows in the batch.
        context: Tokens in a window.
        d_model: Width of the state.
        heads: Attention heads; they must divide the width.
        scale: Weight of the attention and its damping in the force.
        damping: Weight of the damping beside the attention.
        model: `equilibrium`, or `gpt`.
        rules: Of the gpt, such as FeedbackAlignment,SignSymmetry.
        layers: Of the gpt, the number of blocks.
        steps: Of the gpt, how long each rule trains; 0: at the initialisation only.
        json: File to write the figures to, as JSON.
        png: File to write a picture to; needs matplotlib.

    Returns:
        The report that was printed.
    """
    options = dict(locals())
    if model not in _OWN:
        raise unknown("model", model, _OWN)
    default = defaults_of(audit)
    foreign = [name for other, names in _OWN.items() if other != model for name in names]
    if given := [f"--{name}" for name in foreign if options[name] != default[name]]:
        raise ConfigError(f"the audit of model {model} has no {', '.join(given)}: leave that out")
    if json is not None and json == png:
        raise ConfigError(f"json and png are both {json}: give each a file of its own")
    for path in (json, png):
        if path is not None:
            AuditReport.check_target(path, plot=path is png)
    if model == "gpt":
        if not rules:
            raise ConfigError(
                "--model gpt needs rules: write --rules FeedbackAlignment,SignSymmetry"
            )
        if steps < 0:
            raise ConfigError(f"steps is {steps}, expected at least 0")
        config = TrainConfig(
            data=data, model="gpt", layers=layers, d_model=d_model, heads=heads, context=context,
            batch=batch, seed=seed, steps=max(1, steps), warmup=min(100, steps // 10), device="cpu",
        )  # fmt: skip
        report, said = audit_gpt(rules, config, training=steps > 0)
    else:
        sizes = Sizes(batch, context, d_model, heads, scale, damping)
        every = range(seed, seed + seeds)
        report, said = _audit_reference(data, every, rows, repeats, phase_steps, sizes)
    made = {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "command": _command({k: v for k, v in options.items() if k not in foreign}),
    }
    report = replace(report, extra={**report.extra, **made})
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(report)
    if json is not None:
        said.append(f"wrote {report.write_json(json)}")
    if png is not None:
        said.append(f"wrote {report.plot(png)}")
    for line in said:
        console.print(printable(line), markup=False, emoji=False)
    return report


def _audit_reference(
    data: str,
    seeds: Sequence[int],
    rows: tuple[str, ...] | None,
    repeats: int,
    phase_steps: int,
    sizes: Sizes,
) -> tuple[AuditReport, list[str]]:
    """Audit the estimators on the reference problem; return a report and what is to be said of it.

    **Raises:** `ConfigError` for no seed, and for rows that are not there.
    """
    if not seeds:
        raise ConfigError(f"seeds is {len(seeds)}, expected at least 1")
    arms = {arm.describe().name: arm for arm in make_arms(phase_steps)}
    if rows == ():
        raise ConfigError(f"rows is empty: leave it out, or name some of {', '.join(arms)}")
    for row in rows or ():
        if row not in arms:
            raise unknown("row", row, arms)
    chosen = [arm for name, arm in arms.items() if rows is None or name in rows]
    corpus = load_corpus(data)
    _check_memory(sizes, len(corpus.tokenizer))
    rests: list[Rest] = []

    def trials() -> Iterator[Trial]:
        for seed in seeds:
            trial = make_trial(corpus, sizes, seed, count)
            rests.append(relax(trial))
            yield trial

    # the arms and the reference, once for every seed and on the first also for times and memory
    losses = (len(chosen) + 1) * (len(seeds) + repeats + 1) + len(seeds)
    with counting(losses + CHECKS, "gradient") as count:
        report = audit_trials(trials(), chosen, REFERENCE, repeats=repeats)
        checked = check_reference(corpus, sizes, seeds[0], count)

    rest = Rest(
        max(r.force_residual for r in rests),
        max(r.step_residual for r in rests),
        max(r.abscissa for r in rests),
    )
    found = {
        "seeds": list(seeds),
        "free_phase": {
            "solver": repr(RELAXATION),
            **asdict(rest),
            "verdict": rest.verdict,
            "trials": [asdict(r) for r in rests],
        },
        "finite_difference": checked,
        "problem": {
            **asdict(sizes),
            "loss": "mean cross-entropy over all tokens",
            "corpus": _identity(corpus),
        },
    }
    worst = "1 seed" if len(seeds) == 1 else f"worst of {len(seeds)} seeds"
    said = [
        f"Free phase ({worst}): {rest.verdict}; step residual {rest.step_residual:.1e}.",
        _finite_differences(checked),
    ]
    return replace(report, extra=found), said


def _check_memory(sizes: Sizes, vocabulary: int) -> None:
    """Refuse a problem whose weights, kept states and logits alone are past the memory there is."""
    tokens = sizes.batch * sizes.context
    states = RELAXATION.max_steps * tokens * sizes.d_model  # which the reference keeps
    matrices = (MATRICES["damped"] * sizes.d_model + 2 * vocabulary) * sizes.d_model
    check_memory(
        FLOAT * (matrices + states + 2 * tokens * vocabulary),
        f"batch is {sizes.batch}, context is {sizes.context}, d_model is {sizes.d_model}",
    )


def _finite_differences(checked: dict[str, Any]) -> str:
    error, sizes = checked["relative_error"], checked["instance"]
    said = "confirm" if error < FINITE_DIFFERENCES else "DO NOT confirm"
    return (
        f"Finite differences in float64 {said} the reference: relative error {error:.1e} "
        f"(B={sizes['batch']}, T={sizes['context']}, C={sizes['d_model']}, H={sizes['heads']})."
    )


def _identity(corpus: Corpus) -> dict[str, Any]:
    keys = ("name", "description", "train", "validation", "vocabulary", "train_sha256")
    facts = describe(corpus)
    return {key: facts[key] for key in keys}


def _command(options: Mapping[str, Any]) -> str:
    """Return the words that compute the same figures again."""
    words = ["altprop", "audit"]
    for name, value in options.items():
        if value is not None and name not in ("json", "png"):
            text = dumps(plain(value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name}", text]
    return shlex.join(words)
