"""Audit learning rules: their gradients beside an exact one, on the same model and batch.

Every arm sees the same weights, buffers, data and random draws, and the model is left as it was
found. Nothing here knows a rule by name.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from altprop.auditing.agreement import compare_all
from altprop.auditing.arms import AbstractArm, as_arm
from altprop.auditing.measure import Trial, costs_of, measured_gradients, untouched
from altprop.auditing.report import AuditReport
from altprop.auditing.rows import Cost, Measured, Outcome, Reference, Row
from altprop.errors import ConfigError
from altprop.rule import AbstractRule


def audit(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    rules: Sequence[AbstractRule | AbstractArm],
    reference: AbstractRule | AbstractArm,
    *,
    repeats: int = 3,
    floor: float | None = None,
    by: Callable[[str], str] | None = None,
) -> AuditReport:
    """Compare the gradients that `rules` give with that of a `reference`, per parameter.

    Use it before trusting a rule on a new model. It says nothing about whether training by the rule
    beats leaving the layers frozen. The model's mode, train or eval, is left as it is.

    **Arguments:** `model`; `batch`, a pair `(input, target)`, or a list of pairs, one per trial;
    `loss_fn(output, target)`, the scalar loss, or `None` where `model(input, target)` returns the
    loss itself (the way for a model that passes `cost=` on to its `Equilibrium`); `rules`,
    estimators, or an `Arm` each; `reference`, likewise, such as `Arm(BPTT(), Euler(0.1, 120))`;
    `repeats`, `floor` and `by`, see `audit_trials`.

    **Raises:** as `audit_trials`.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(f"loss_fn is {loss_fn!r}, expected loss_fn(output, target) or None")

    def loss(x: Any, y: Any) -> Tensor:
        return model(x, y) if loss_fn is None else loss_fn(model(x), y)

    def trial(number: int, pair: Any) -> Trial:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(
                f"batch is a {type(pair).__name__}, expected a pair (input, target) or a list of "
                "such pairs; for anything else use audit_trials"
            )
        return Trial(model, lambda: loss(*pair), f"batch {number}")

    several = isinstance(batch, list) and not (batch and isinstance(batch[0], Tensor))
    pairs = batch if several else [batch]
    trials = [trial(number, pair) for number, pair in enumerate(pairs)]
    return audit_trials(trials, rules, reference, repeats=repeats, floor=floor, by=by)


def audit_trials(
    trials: Iterable[Trial],
    rules: Sequence[AbstractRule | AbstractArm],
    reference: AbstractRule | AbstractArm,
    *,
    repeats: int = 3,
    floor: float | None = None,
    by: Callable[[str], str] | None = None,
) -> AuditReport:
    """Compare gradients over several models, batches or seeds; see `audit`.

    **Arguments:** `trials`, drawn one by one; their models must have parameters of equal names.
    `repeats`, how often the first trial is timed (0: never), all arms in turn, after each has run
    once; the report has the medians. `floor`, the norm of a parameter's reference gradient,
    relative to the whole, up to which it counts as noise and is left out (`None`: 32 eps). `by`,
    from a parameter's name to that of the part, a layer say, with which it is compared as one
    (`None`: each by itself).

    **Raises:** `ConfigError` for an arm that is the reference itself, arms of one name, no arm or
    trial, or a loss that is no scalar or depends on no trainable parameter; `RuleError` for an arm
    that does not fit the model.
    """
    if type(repeats) is not int or repeats < 0:
        raise ConfigError(f"repeats is {repeats!r}, expected a whole number ≥ 0")
    exact = as_arm(reference, "reference")
    if not isinstance(rules, (list, tuple)) or not rules:
        raise ConfigError(f"rules is {rules!r}, expected a list such as [AEP(), EP()]")
    arms = [as_arm(rule, f"rules[{i}]") for i, rule in enumerate(rules)]
    names = [arm.describe().name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"several arms are called {', '.join(twice)}: give each a name, Arm(rule, name='...')"
        )
    norms: list[dict[str, float]] = []
    solved: list[Measured] = []
    outcomes: list[list[Outcome]] = [[] for _ in arms]
    costs: list[Cost] = []
    titles: list[str] = []
    for trial in trials:
        _check_distinct(trial.model, exact, arms)
        with untouched(trial.model) as restore:
            references, measured = measured_gradients(trial, exact, by)
            if norms and norms[0].keys() != references.keys():
                raise ConfigError(f"{trial.name}: its model has other parameters than the first")
            norms.append({name: float(g.double().norm()) for name, g in references.items()})
            solved.append(measured)
            titles.append(trial.name)
            for arm, found in zip(arms, outcomes, strict=True):
                restore()
                gradients, measured = measured_gradients(trial, arm, by)
                found.append(Outcome(*compare_all(gradients, references, floor), measured))
            if not costs:
                costs = costs_of(trial, [exact, *arms], repeats, restore)
    if not titles:
        raise ConfigError("there is no batch or trial to audit: give at least one")
    mean_norms = {name: statistics.fmean(n[name] for n in norms) for name in norms[0]}
    return AuditReport(
        Reference(exact.describe(), mean_norms, solved, costs[0]),
        [
            Row(arm.describe(), found, cost)
            for arm, found, cost in zip(arms, outcomes, costs[1:], strict=True)
        ],
        titles,
    )


def _check_distinct(model: nn.Module, exact: AbstractArm, arms: Sequence[AbstractArm]) -> None:
    """Refuse an arm that would be compared with itself: it agrees whatever it computes."""
    reference = exact.identity(model)
    for arm in arms:
        if arm.identity(model) == reference:
            raise ConfigError(
                f"{arm.describe().name} is the reference itself (same rule, same solver) and would "
                "agree whatever it computes: drop it, or take another reference"
            )
