"""Audit learning rules on a GPT: how good each gradient is, layer by layer, while it learns by it.

Each rule trains a model of its own from one initialisation on the same batches; at stated steps its
gradient is compared with the exact one at the weights that it has reached. Beside the figures stand
three checks that keep them honest: scale stability along the depth, the reference's validity, and
whether training the blocks by the rule beats leaving them frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from altprop import AbstractRule, AuditReport, ConfigError, Installed, Trial, audit_trials
from altprop.lab.building import build_model
from altprop.lab.corpus import corpus_of
from altprop.lab.display import counting
from altprop.lab.evaluation import evaluate
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Progress, State
from altprop.lab.train import begin, pick_device, steps
from altprop.lab.values import plain
from altprop.lm.text import Batches, windows

PLACES = 5  # where a rule is measured on its way, evenly spaced
CONTROLS: Mapping[str, tuple[str, ...]] = {"backprop": (), "frozen": ("blocks.*",)}


def audit_gpt(
    rules: Sequence[AbstractRule], config: TrainConfig, *, training: bool
) -> tuple[AuditReport, list[str]]:
    """Audit `rules` on the model of `config`; return a report and the checks in words.

    With `training` each rule trains its model for `config.steps` and is measured at five places on
    the way; otherwise at its start alone. Every place is a row of the report.

    **Raises:** `RuleError` for a rule that does not fit; `ConfigError` for rules of one name.
    """
    runs = {name: replace(config, rule=rule) for name, rule in _named(rules).items()}
    corpus = corpus_of(config)
    for run in runs.values():
        build_model(run, len(corpus.tokenizer))  # every misfit is heard before anything takes time
    device = pick_device(config.device)
    held_out = windows(corpus.validation, config.eval_windows, config.context, seed=0)
    generator = torch.Generator().manual_seed(config.seed + 1)
    batches = Batches(corpus.train, config.batch, config.context, generator)
    batch = [t.to(device) for t in batches.draw()]
    last = config.steps if training else 0
    places = {round(last * part / (PLACES - 1)) for part in range(PLACES)}
    reports: list[AuditReport] = []

    def trained(run: TrainConfig, look: Callable[[State], object]) -> Progress:
        """Train, look at the start and after every step, and return how it ended."""
        state, guard = begin(run, corpus)
        look(state)
        count()
        for _ in islice(steps(run, state, guard), last):
            look(state)
            count()
        state.progress.loss = evaluate(state.model, held_out, run.batch, device).loss
        return state.progress

    def audited(name: str, run: TrainConfig) -> dict[str, Any]:
        found: list[AuditReport] = []
        made: list[int] = []

        def look(state: State) -> None:
            if state.progress.step in places:
                made.append(state.progress.step)
                found.append(_measure(f"{name}, step {made[-1]}", state, batch))

        end = trained(run, look)
        reports.extend(found)
        return {
            "value": plain(run.rule),
            "steps": made,
            "scale_stability": [_scale_stability(report) for report in found],
            "invalid": sorted(found[-1].rows[0].flags),
            "validation_loss": end.loss,
            "refused": end.refused,
        }

    with counting((len(runs) + len(CONTROLS) * training) * (last + 1), "step") as count:
        audits = {name: audited(name, run) for name, run in runs.items()}
        controls = {}
        for name, freeze in CONTROLS.items() if training else ():
            run = replace(config, rule=None, freeze=freeze)
            controls[name] = trained(run, lambda state: None).loss
    problem = {k: plain(v) for k, v in vars(config).items() if k not in ("rule", "rules")}
    report = AuditReport(
        replace(reports[0].reference, norms={}),  # of every row another, as the weights change
        [row for report in reports for row in report.rows],
        reports[0].trials,
        {"problem": problem, "controls": controls, "rules": audits},
    )
    return report, [f"{name}: {_checks(audit, controls)}" for name, audit in audits.items()]


def _named(rules: Sequence[AbstractRule]) -> dict[str, AbstractRule]:
    names = [type(rule).__name__ for rule in rules]
    names = [n if names.count(n) == 1 else repr(r) for n, r in zip(names, rules, strict=True)]
    if len(set(names)) < len(names):
        raise ConfigError(f"the same rule is named twice: {', '.join(sorted(names))}")
    return dict(zip(names, rules, strict=True))


def _measure(name: str, state: State, batch: Sequence[torch.Tensor]) -> AuditReport:
    """Compare the rule's gradient with the exact one, by layer.

    Works on a copy, so that a rule that counts its passes or carries estimates is not disturbed.
    """
    model = copy.deepcopy(state.model)
    trial = Trial(model, lambda: model(*batch)[1], "a batch")
    arms, exact = [Installed(name=name)], Installed(exact=True, name="backprop")
    return audit_trials([trial], arms, exact, repeats=0, floor=1e-6, by=_layer)


def _layer(parameter: str) -> str:
    first, second, *_ = parameter.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def _scale_stability(report: AuditReport) -> float | None:
    """Return the smallest over the largest norm ratio of the blocks."""
    layers = report.rows[0].parameters.items()
    ratios = [a.figures["norm_ratio"].mean for layer, a in layers if layer.startswith("blocks.")]
    known = [ratio for ratio in ratios if ratio]
    return min(known) / max(known) if known else None


def _checks(audit: Mapping[str, Any], controls: Mapping[str, float]) -> str:
    """Say the three honesty checks of a rule in words."""
    ratio, loss = audit["scale_stability"][-1], audit["validation_loss"]
    invalid = ", ".join(audit["invalid"])
    parts = [
        f"scale stability {'undefined' if ratio is None else f'{ratio:.2g}'} (smallest over "
        "largest norm ratio of the blocks)",
        f"no figure for {invalid}" if invalid else "reference valid in every layer",
    ]
    if controls:
        gap = controls["frozen"] - controls["backprop"]
        share = f"; recovery {(controls['frozen'] - loss) / gap:.0%}" if gap > 0 else ""
        parts.append(
            f"depth utility: validation {loss:.3f}, frozen blocks {controls['frozen']:.3f}, "
            f"backprop {controls['backprop']:.3f}{share}"
        )
    if audit["refused"]:
        parts.append(f"{audit['refused']} steps were refused")
    return "; ".join(parts)
