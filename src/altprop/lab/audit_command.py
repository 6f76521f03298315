"""The command `altprop audit`: every estimator's gradient beside an exact one, on one problem."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import altprop
from altprop import AbstractRule, AuditReport, ConfigError, Trial, audit_trials
from altprop.errors import unknown
from altprop.lab.audit_gpt import audit_gpt
from altprop.lab.reference import (
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
from altprop.lm.text import Corpus, describe, load_corpus

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
) -> AuditReport | None:
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
        The report that was printed; nothing of a gpt.
    """
    if model not in ("equilibrium", "gpt"):
        raise unknown("model", model, ("equilibrium", "gpt"))
    if json is not None and json == png:
        raise ConfigError(f"json and png are both {json}: give each a file of its own")
    if model == "gpt":
        _refuse_others(
            "gpt",
            seeds=seeds != 3,
            rows=rows is not None,
            repeats=repeats != 3,
            phase_steps=phase_steps != 100,
            scale=scale != 1,
            damping=damping != 1,
        )
        if not rules:
            raise ConfigError(
                "--model gpt needs rules: write --rules FeedbackAlignment,SignSymmetry"
            )
        if steps < 0:
            raise ConfigError(f"steps is {steps}, expected at least 0")
        config = TrainConfig(
            data=data, model="gpt", layers=layers, d_model=d_model, heads=heads, context=context,
            batch=batch, seed=seed, steps=max(1, steps), warmup=min(100, steps // 10),
        )  # fmt: skip
        table, checks = audit_gpt(rules, config, json, png, training=steps > 0)
        console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
        console.print(table)
        for line in [*checks, *(f"wrote {path}" for path in (json, png) if path)]:
            console.print(line, markup=False)
        return None
    _refuse_others("equilibrium", rules=bool(rules), layers=layers != 4, steps=steps != 0)
    for path in (json, png):
        if path is not None:
            AuditReport.check_target(path, plot=path is png)
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}, expected at least 1")
    arms = {arm.describe().name: arm for arm in make_arms(phase_steps)}
    if rows == ():
        raise ConfigError(f"rows is empty: leave it out, or name some of {', '.join(arms)}")
    for row in rows or ():
        if row not in arms:
            raise unknown("row", row, arms)
    corpus = load_corpus(data)
    sizes = Sizes(batch, context, d_model, heads, scale, damping)
    console = Console(width=None if sys.stdout.isatty() else 100)
    rests: list[Rest] = []

    with console.status("") as status:

        def trials() -> Iterator[Trial]:
            for number in range(seeds):
                status.update(f"seed {number + 1} of {seeds}")
                trial = make_trial(corpus, sizes, seed + number)
                rests.append(relax(trial))
                yield trial

        chosen = [arm for name, arm in arms.items() if rows is None or name in rows]
        report = audit_trials(trials(), chosen, REFERENCE, repeats=repeats)
        status.update("checking the reference by finite differences")
        checked = check_reference(corpus, sizes, seed)

    rest = Rest(
        max(r.force_residual for r in rests),
        max(r.step_residual for r in rests),
        max(r.abscissa for r in rests),
    )
    options = {"data": data, "seeds": seeds, "seed": seed, "repeats": repeats,
               "phase_steps": phase_steps, "batch": batch, "context": context,
               "d_model": d_model, "heads": heads, "scale": scale, "damping": damping}  # fmt: skip
    report = replace(
        report,
        extra={
            "seeds": list(range(seed, seed + seeds)),
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
            "versions": {
                "altprop": altprop.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
            "command": _command({**options, "rows": _as_list(rows)}),
        },
    )
    console.print(report.table())
    console.print(f"Free phase ({_seeds(seeds)}): {rest.verdict}; step residual "
                  f"{rest.step_residual:.1e}.", highlight=False)  # fmt: skip
    console.print(_finite_differences(checked), highlight=False)
    if json is not None:
        console.print(f"wrote {report.write_json(json)}", highlight=False)
    if png is not None:
        console.print(f"wrote {report.plot(png)}", highlight=False)
    return report


def _refuse_others(model: str, **given: bool) -> None:
    """Refuse options that belong to the audit of the other model, rather than ignore them."""
    names = [f"--{name}" for name, is_given in given.items() if is_given]
    if names:
        raise ConfigError(f"the audit of model {model} has no {', '.join(names)}: leave that out")


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"worst of {count} seeds"


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


def _as_list(rows: tuple[str, ...] | None) -> str | None:
    """Write names as the command line reads them back."""
    return None if rows is None else "[" + ", ".join(f'"{row}"' for row in rows) + "]"


def _command(options: dict[str, Any]) -> str:
    words = ["altprop", "audit"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
