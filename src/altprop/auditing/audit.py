"""Audit learning rules: their gradients beside an exact one, on the same model and batch.

An arm is one way to compute a gradient; every arm sees the same weights, buffers, data and random
draws, and the model is left as it was found. Nothing here knows a rule by name.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from altprop.auditing.agreement import compare_all
from altprop.auditing.memory import peak_live_bytes
from altprop.auditing.report import AuditReport, Cost, Measured, Outcome, Reference, Row, Words
from altprop.conversion.convert import convert, revert
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.estimators.problem import Certificate
from altprop.equilibrium.module import equilibria, using
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import ConfigError, RuleError
from altprop.rule import AbstractRule, Seam

Loss = Callable[[], Tensor]
Gradients = dict[str, Tensor]


class AbstractArm(ABC):
    """Base of the arms of an audit: a frozen dataclass that lends a model a rule for a while."""

    @abstractmethod
    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the gradients of `model` are this arm's."""

    @abstractmethod
    def identity(self, model: nn.Module) -> Hashable:
        """Return what this arm computes on `model`; equal arms compute the same gradient.

        **Raises:** `RuleError` where the arm would change nothing in `model`.
        """

    @abstractmethod
    def describe(self) -> Words:
        """Return the arm in words."""


@dataclass(frozen=True)
class Arm(AbstractArm):
    """Give every `Equilibrium` of a model an estimator and, where given, a solver.

    A solve that misses its tolerance is accepted, and reported.

    **Arguments:** `estimator`; `solver`, of the free phase and the estimator's own (`None`: the
    model's); `name`, for tables (`None`: the estimator and solver in short).
    """

    estimator: AbstractEstimator
    solver: AbstractSolver | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, AbstractEstimator):
            raise ConfigError(
                f"Arm: estimator is {self.estimator!r}, expected an estimator: write Arm(AEP())"
            )
        if not (self.solver is None or isinstance(self.solver, AbstractSolver)):
            raise ConfigError(
                f"Arm: solver is {self.solver!r}, expected a solver or None: write "
                "Arm(BPTT(), solver=Euler(0.1, 120))"
            )

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return using(model, self.estimator, self.solver, on_failure="accept")

    def identity(self, model: nn.Module) -> Hashable:
        found = tuple(
            (path, self.estimator, self.solver or module.solver)
            for path, module in equilibria(model)
        )
        if not found:
            raise RuleError(
                f"{_brief(self.estimator)} acts on an Equilibrium, and {type(model).__name__} has "
                "none: build the model with Equilibrium(dynamics, solver, estimator)"
            )
        return found

    def describe(self) -> Words:
        solver = None if self.solver is None else repr(self.solver)
        short = _brief(self.estimator) + (f", {_brief(self.solver)}" if self.solver else "")
        return Words(self.name or short, repr(self.estimator), solver)


@dataclass(frozen=True)
class RuleArm(AbstractArm):
    """Convert a model to transport and broadcast rules for a while.

    Feedback is drawn anew for every audit from `seed`; `Backprop()` is the exact reference.

    **Arguments:** `rule`, one for all places or a mapping of name patterns; `output`, the path of
    the linear map that makes the logits, where a broadcast rule needs it; `seed`, of the feedback;
    `name`, for tables (`None`: the rule in short).
    """

    rule: AbstractRule | Mapping[str, AbstractRule]
    output: str | None = None
    seed: int = 0
    name: str | None = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        convert(model, self.rule, output=self.output, seed=self.seed)
        try:
            yield
        finally:
            revert(model)

    def identity(self, model: nn.Module) -> Hashable:
        return repr(self.rule), self.seed

    def describe(self) -> Words:
        short = _brief(self.rule) if isinstance(self.rule, AbstractRule) else repr(self.rule)
        return Words(self.name or short, repr(self.rule), None)


# How a bare rule becomes an arm. A new seam adds its arm here, and nothing else changes.
_ARMS: dict[Seam, Callable[[Any], AbstractArm]] = {
    "adjoint": Arm,
    "transport": RuleArm,
    "broadcast": RuleArm,
}


@dataclass(frozen=True)
class Trial:
    """One model and one loss of it: `loss()` computes a scalar from the model as it then is."""

    model: nn.Module
    loss: Loss
    name: str


def audit(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    rules: Sequence[AbstractRule | AbstractArm],
    reference: AbstractRule | AbstractArm,
    *,
    repeats: int = 3,
    floor: float | None = None,
) -> AuditReport:
    """Compare the gradients that `rules` give with that of a `reference`, per parameter.

    Use it before trusting a rule on a new model. It says nothing about whether training by the rule
    beats leaving the layers frozen. The model's mode, train or eval, is left as it is.

    **Arguments:** `model`; `batch`, a pair `(input, target)`, or a list of pairs, one per trial;
    `loss_fn(output, target)`, the scalar loss, or `None` where `model(input, target)` returns the
    loss itself (the way for a model that passes `cost=` on to its `Equilibrium`); `rules`,
    estimators, or an `Arm` each; `reference`, likewise, such as `Arm(BPTT(), Euler(0.1, 120))`;
    `repeats` and `floor`, see `audit_trials`.

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
    return audit_trials(trials, rules, reference, repeats=repeats, floor=floor)


def audit_trials(
    trials: Iterable[Trial],
    rules: Sequence[AbstractRule | AbstractArm],
    reference: AbstractRule | AbstractArm,
    *,
    repeats: int = 3,
    floor: float | None = None,
) -> AuditReport:
    """Compare gradients over several models, batches or seeds; see `audit`.

    **Arguments:** `trials`, drawn one by one; their models must have parameters of equal names.
    `repeats`, how often the first trial is timed (0: never), all arms in turn, after each has run
    once; the report has the medians. `floor`, the norm of a parameter's reference gradient,
    relative to the whole, up to which it counts as noise and is left out (`None`: 32 eps).

    **Raises:** `ConfigError` for an arm that is the reference itself, arms of one name, no arm or
    trial, or a loss that is no scalar or depends on no trainable parameter; `RuleError` for an arm
    that does not fit the model.
    """
    if type(repeats) is not int or repeats < 0:
        raise ConfigError(f"repeats is {repeats!r}, expected a whole number ≥ 0")
    exact = _as_arm(reference, "reference")
    if not isinstance(rules, (list, tuple)) or not rules:
        raise ConfigError(f"rules is {rules!r}, expected a list such as [AEP(), EP()]")
    arms = [_as_arm(rule, f"rules[{i}]") for i, rule in enumerate(rules)]
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
        with _untouched(trial.model) as restore:
            references, measured = _measured_gradients(trial, exact)
            if norms and norms[0].keys() != references.keys():
                raise ConfigError(f"{trial.name}: its model has other parameters than the first")
            norms.append({name: float(g.double().norm()) for name, g in references.items()})
            solved.append(measured)
            titles.append(trial.name)
            for arm, found in zip(arms, outcomes, strict=True):
                restore()
                gradients, measured = _measured_gradients(trial, arm)
                found.append(Outcome(*compare_all(gradients, references, floor), measured))
            if not costs:
                costs = _costs(trial, [exact, *arms], repeats, restore)
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


def finite_difference_errors(
    loss: Loss,
    model: nn.Module,
    rule: AbstractRule | AbstractArm,
    *,
    directions: int = 4,
    step: float = 3e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Return how far a rule's gradient is from finite differences of its own loss, per parameter.

    This is the reference of a reference: it needs no derivative at all. Along random directions `v`
    the central difference of fourth order is compared with `gᵀv`; the error is relative, over all
    directions of a parameter. Differences resolve no gradient far below the loss's own rounding, so
    choose an instance without such. The cost is four losses per direction and parameter.

    **Arguments:** `loss`, as of a `Trial`; `model`, in float64; `directions`, how many per
    parameter; `step`, relative to the parameter's norm; `seed`, of the directions.

    **Raises:** `ConfigError` for a model that is not in float64.
    """
    arm, trial = _as_arm(rule, "rule"), Trial(model, loss, "finite differences")
    leaves = _trainable(model)
    for name, leaf in leaves.items():
        if leaf.dtype != torch.float64:
            raise ConfigError(
                f"{name} is {leaf.dtype}: finite differences mean something in float64 only, "
                "write model.double()"
            )
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    with _untouched(model) as restore:
        gradients, _ = _measured_gradients(trial, arm)

        def at(leaf: Tensor, value: Tensor) -> float:
            restore()
            leaf.copy_(value)
            return float(loss())

        with torch.no_grad(), arm.applied(model):
            for name, leaf in leaves.items():
                own, products, slopes = leaf.clone(), [], []
                for _ in range(directions):
                    v = torch.randn(own.shape, generator=generator, dtype=own.dtype).to(own.device)
                    v /= v.norm()
                    h = step * (float(own.norm()) or 1.0)
                    try:
                        near = at(leaf, own + h * v) - at(leaf, own - h * v)
                        far = at(leaf, own + 2 * h * v) - at(leaf, own - 2 * h * v)
                    finally:
                        leaf.copy_(own)
                    slopes.append((8 * near - far) / (12 * h))
                    products.append(float((gradients[name] * v).sum()))
                size = math.hypot(*products)
                gap = math.dist(products, slopes)
                errors[name] = gap / size if size > 0 else math.inf if gap > 0 else 0.0
    return errors


def _as_arm(value: Any, what: str) -> AbstractArm:
    if isinstance(value, AbstractArm):
        return value
    if isinstance(value, AbstractRule):
        if value.seam not in _ARMS:
            raise RuleError(
                f"{what} is {value!r}, a {value.seam} rule: an audit takes rules of these seams: "
                f"{', '.join(_ARMS)}"
            )
        return _ARMS[value.seam](value)
    given = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    raise ConfigError(f"{what} is {given}, expected a rule or an Arm: write AEP() or Arm(AEP())")


def _check_distinct(model: nn.Module, exact: AbstractArm, arms: Sequence[AbstractArm]) -> None:
    """Refuse an arm that would be compared with itself: it agrees whatever it computes."""
    reference = exact.identity(model)
    for arm in arms:
        if arm.identity(model) == reference:
            raise ConfigError(
                f"{arm.describe().name} is the reference itself (same rule, same solver) and would "
                "agree whatever it computes: drop it, or take another reference"
            )


@contextmanager
def _untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield what puts buffers and random generators back, and do so at the end."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cuda = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    host, states = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in cuda}

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(host)
        for device, state in states.items():
            torch.cuda.set_rng_state(state, device)

    try:
        yield restore
    finally:
        restore()


def _trainable(model: nn.Module) -> Gradients:
    """Return the trainable parameters by name, the common start of their names left out."""
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not leaves:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter to audit")
    paths = [name.split(".") for name in leaves]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    return {".".join(name.split(".")[shared:]): p for name, p in leaves.items()}


def _gradients(trial: Trial, leaves: Gradients) -> Gradients:
    """Return the gradient of every leaf under the arm that is applied; zero where none arrives."""
    with torch.enable_grad():
        loss = trial.loss()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ConfigError(f"{trial.name}: the loss is {given}, expected a scalar tensor")
        if not loss.requires_grad:
            raise ConfigError(f"{trial.name}: the loss depends on no trainable parameter")
        found = torch.autograd.grad(
            loss.reshape(()), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(leaves, found, strict=True))


def _measured_gradients(trial: Trial, arm: AbstractArm) -> tuple[Gradients, Measured]:
    """Return the gradients, and what the certificates of all solves say once they are there."""
    certificates: list[Certificate] = []

    def keep(module: Any, _: Any, __: Any) -> None:
        certificates.append(module.certificate)

    leaves = _trainable(trial.model)  # before an arm adds its own
    hooks = [module.register_forward_hook(keep) for _, module in equilibria(trial.model)]
    try:
        with arm.applied(trial.model):
            gradients = _gradients(trial, leaves)
    finally:
        for hook in hooks:
            hook.remove()
    return gradients, _measured(certificates)


def _measured(certificates: Sequence[Certificate]) -> Measured:
    if not certificates:
        return Measured()

    def known(name: str) -> list[Tensor]:
        return [v for c in certificates if (v := getattr(c, name)) is not None]

    def worst(name: str) -> float | None:
        return max((float(v.max()) for v in known(name)), default=None)

    failed = [
        f"{what} not solved: {result.value}"
        for c in certificates
        for what, result in (("free phase", c.result), ("adjoint", c.adjoint_result))
        if result is not None and not result
    ]
    betas = known("beta")
    return Measured(
        evaluations=sum(c.free_evaluations + c.adjoint_evaluations for c in certificates),
        free_residual=worst("free_residual"),
        adjoint_residual=worst("adjoint_residual"),
        beta=float(torch.cat(betas).mean()) if betas else None,
        response=worst("response"),
        nudged_residual=worst("nudged_residuals"),
        antisymmetry=worst("antisymmetry"),
        failures=tuple(dict.fromkeys(failed)),
    )


def _costs(
    trial: Trial, arms: Sequence[AbstractArm], repeats: int, restore: Callable[[], None]
) -> list[Cost]:
    """Time the arms in turn, so that what disturbs the machine disturbs all of them alike."""
    leaves = _trainable(trial.model)
    device = next(iter(leaves.values())).device
    times: list[list[float]] = [[] for _ in arms]
    for _ in range(repeats):
        for arm, own in zip(arms, times, strict=True):
            restore()
            with arm.applied(trial.model):
                _wait(device)
                start = time.perf_counter()
                _gradients(trial, leaves)
                _wait(device)
            own.append(1e3 * (time.perf_counter() - start))
    costs = []
    for arm, own in zip(arms, times, strict=True):
        restore()
        with arm.applied(trial.model):
            peak = peak_live_bytes(partial(_gradients, trial, leaves), device)
        costs.append(Cost(statistics.median(own) if own else None, peak))
    return costs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _brief(value: Any) -> str:
    """Write a dataclass as a call with the arguments that are not its defaults."""
    changed = [
        f"{f.name}={getattr(value, f.name)!r}"
        for f in fields(value)
        if f.default is MISSING or getattr(value, f.name) != f.default
    ]
    return f"{type(value).__name__}({', '.join(changed)})" if changed else type(value).__name__
