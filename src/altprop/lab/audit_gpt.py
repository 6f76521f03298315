"""Audit learning rules on a GPT: how good each gradient is, layer by layer, while it learns by it.

Each rule trains a model of its own from one initialisation on the same batches; at stated steps its
gradient is compared with the exact one at the weights that it has reached. Beside the figures stand
three checks that keep them honest: scale stability along the depth, the reference's validity, and
whether training the blocks by the rule beats leaving them frozen.
"""

from __future__ import annotations

import copy
import json as jsonlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from altprop import (
    AbstractRule,
    Agreement,
    AuditReport,
    ConfigError,
    compare,
    feedback_parameters,
    rules_off,
)
from altprop.files import replacing, write_whole
from altprop.lab.evaluation import evaluate
from altprop.lab.settings import TrainConfig
from altprop.lab.train import build_model, learning_rate, make_optimiser
from altprop.lab.values import plain
from altprop.lm.model import LanguageModel
from altprop.lm.text import Batches, load_corpus, windows

CPU = torch.device("cpu")
FIGURES = ("cosine", "norm_ratio", "sign_agreement")


@dataclass(frozen=True)
class RuleAudit:
    """What was measured of one rule.

    `steps`: where it was measured. `layers`: by layer, one `Agreement` per step; `whole`: of all
    parameters together. `stability`: per step, the smallest over the largest norm ratio of the
    blocks. `loss`: validation cross-entropy at the end.
    """

    name: str
    rule: AbstractRule
    steps: list[int]
    layers: dict[str, list[Agreement]]
    whole: list[Agreement]
    stability: list[float | None]
    loss: float


def audit_gpt(
    rules: Sequence[AbstractRule],
    config: TrainConfig,
    json: Path | None,
    png: Path | None,
    *,
    training: bool,
) -> tuple[Table, list[str]]:
    """Audit `rules` on the model of `config`; return a table and the checks in words.

    With `training` each rule trains its model for `config.steps` and is measured at five places on
    the way; otherwise at the initialisation alone.

    **Raises:** `RuleError` for a rule that does not fit; `ConfigError` for rules of one name.
    """
    for path in (json, png):
        if path is not None:
            AuditReport.check_target(path, plot=path is png)
    names = [type(rule).__name__ for rule in rules]
    names = [n if names.count(n) == 1 else repr(r) for n, r in zip(names, rules, strict=True)]
    if len(set(names)) < len(names):
        raise ConfigError(f"the same rule is named twice: {', '.join(sorted(names))}")
    corpus = load_corpus(config.data)
    vocabulary = len(corpus.tokenizer)
    held_out = windows(corpus.validation, config.eval_windows, config.context, seed=0)
    arms = [replace(config, rule=rule) for rule in rules]
    for arm in arms:
        build_model(arm, vocabulary)  # every misfit is heard before anything takes time
    controls = {}
    audits = []
    for name, arm in zip(names, arms, strict=True):
        audits.append(_audit_rule(name, arm, corpus.train, vocabulary, held_out, training))
    if training:
        for name, freeze in (("backprop", ()), ("frozen", ("blocks.*",))):
            plain_run = replace(config, rule=None, freeze=freeze)
            model = _model(plain_run, vocabulary)
            for _ in _training(model, plain_run, corpus.train):
                pass
            controls[name] = evaluate(model, held_out, config.batch, CPU).loss
    checks = _checks(audits, controls)
    if json is not None:
        _write_json(json, audits, controls, config)
    if png is not None:
        _draw(png, audits)
    return _table(audits), checks


def _model(config: TrainConfig, vocabulary: int) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return build_model(config, vocabulary)


def _training(model: LanguageModel, config: TrainConfig, tokens: Any) -> Any:
    """Train by whatever rule is in the model, yielding before each step and after the last."""
    optimiser = make_optimiser(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    batches = Batches(tokens, config.batch, config.context, generator)
    for step in range(config.steps):
        yield step
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        ids, targets = batches.draw()
        optimiser.zero_grad(set_to_none=True)
        model(ids, targets)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
    yield config.steps


def _audit_rule(
    name: str,
    config: TrainConfig,
    tokens: Any,
    vocabulary: int,
    held_out: tuple[Tensor, Tensor],
    training: bool,
) -> RuleAudit:
    model = _model(config, vocabulary)
    last = config.steps if training else 0
    places = sorted({round(last * part / 4) for part in range(5)})
    batch = Batches(
        tokens, config.batch, config.context, torch.Generator().manual_seed(config.seed + 1)
    ).draw()
    layers: dict[str, list[Agreement]] = {}
    whole: list[Agreement] = []
    stability: list[float | None] = []
    for step in _training(model, config, tokens):
        if step in places:
            found, together = _measure(model, batch)
            for layer, agreement in found.items():
                layers.setdefault(layer, []).append(agreement)
            whole.append(together)
            stability.append(_scale_stability(found))
        if step == last:
            break
    loss = evaluate(model, held_out, config.batch, CPU).loss
    rule = config.rule
    assert rule is not None
    return RuleAudit(name, rule, places, layers, whole, stability, loss)


def _measure(
    model: LanguageModel, batch: tuple[Tensor, Tensor]
) -> tuple[dict[str, Agreement], Agreement]:
    """Compare the rule's gradient with the exact one, by layer and as a whole.

    Works on a copy, so that a rule that counts its passes or carries estimates is not disturbed.
    """
    copied = copy.deepcopy(model)
    ours = _gradients(copied, batch)
    with rules_off(copied):
        exact = _gradients(copied, batch)
    layers: dict[str, list[str]] = {}
    for name in exact:
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        layers.setdefault(layer, []).append(name)
    floor = 1e-6 * float(_joined(exact, list(exact)).norm())
    found = {
        layer: compare(_joined(ours, names), _joined(exact, names), floor)
        for layer, names in layers.items()
    }
    return found, compare(_joined(ours, list(exact)), _joined(exact, list(exact)), floor)


def _gradients(model: LanguageModel, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(*batch)[1].backward()
    feedback = {id(p) for p in feedback_parameters(model)}
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in weights.items()
        if id(p) not in feedback
    }


def _joined(gradients: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in names])


def _scale_stability(found: dict[str, Agreement]) -> float | None:
    ratios = [
        a.norm_ratio for layer, a in found.items() if layer.startswith("blocks.") and a.norm_ratio
    ]
    return min(ratios) / max(ratios) if ratios else None


def _checks(audits: list[RuleAudit], controls: dict[str, float]) -> list[str]:
    """Say the three honesty checks of every rule in words."""
    lines = []
    for audit in audits:
        ratio = audit.stability[-1]
        scale = "undefined" if ratio is None else f"{ratio:.2g}"
        invalid = sorted({n for n, a in audit.layers.items() if a[-1].flag is not None})
        parts = [
            f"scale stability {scale} (smallest over largest norm ratio of the blocks)",
            "reference valid in every layer"
            if not invalid
            else f"no figure for {', '.join(invalid)}",
        ]
        if controls:
            gap = controls["frozen"] - controls["backprop"]
            recovery = (controls["frozen"] - audit.loss) / gap if gap > 0 else None
            parts.append(
                f"depth utility: validation {audit.loss:.3f}, frozen blocks "
                f"{controls['frozen']:.3f}, backprop {controls['backprop']:.3f}"
                + ("" if recovery is None else f"; recovery {recovery:.0%}")
            )
        lines.append(f"{audit.name}: " + "; ".join(parts))
    return lines


def _table(audits: list[RuleAudit]) -> Table:
    table = Table("rule", "step", "layer", "cosine", "norm ratio", "equal signs", box=None)
    for audit in audits:
        for index, step in enumerate(audit.steps):
            rows = [
                *((n, a[index]) for n, a in audit.layers.items()),
                ("whole", audit.whole[index]),
            ]
            for number, (layer, agreement) in enumerate(rows):
                cells = [_cell(getattr(agreement, figure)) for figure in FIGURES]
                first = number == 0
                table.add_row(
                    audit.name if first and index == 0 else "",
                    str(step) if first else "",
                    layer,
                    *cells,
                    end_section=layer == "whole",
                )
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _write_json(
    path: Path, audits: list[RuleAudit], controls: dict[str, float], config: TrainConfig
) -> None:
    data = {
        "reference": "backprop",
        "problem": {k: plain(v) for k, v in vars(config).items() if k not in ("rule", "rules")},
        "controls": controls,
        "rows": [
            {
                "rule": audit.name,
                "value": plain(audit.rule),
                "steps": audit.steps,
                "layers": {n: [_figures(a) for a in found] for n, found in audit.layers.items()},
                "whole": [_figures(a) for a in audit.whole],
                "scale_stability": audit.stability,
                "validation_loss": audit.loss,
            }
            for audit in audits
        ],
    }
    write_whole(path, jsonlib.dumps(data, indent=1, allow_nan=False) + "\n")


def _figures(agreement: Agreement) -> dict[str, Any]:
    flag = None if agreement.flag is None else agreement.flag.value
    return {**{f: getattr(agreement, f) for f in FIGURES}, "flag": flag}


def _draw(path: Path, audits: list[RuleAudit]) -> None:
    """Draw cosine by depth and step, one panel per rule."""
    from matplotlib.figure import Figure

    columns = min(3, len(audits))
    lines = -(-len(audits) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 0.8 + 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    image = None
    for axis, audit in zip(axes, audits, strict=False):
        names = list(audit.layers)
        values = [[_or_nan(a.cosine) for a in audit.layers[name]] for name in names]
        image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xticks(range(len(audit.steps)), [str(s) for s in audit.steps], fontsize=8)
        mean = statistics.fmean([_or_nan(a.cosine) for a in audit.whole])
        axis.set_title(f"{audit.name}  ({mean:.2f})", fontsize=9)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                dark = abs(value) > 0.6
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")  # fmt: skip
    for axis in axes[len(audits) :]:
        axis.set_axis_off()
    figure.supxlabel("step of training by the rule", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="cosine to backprop", shrink=0.8)
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=130)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
