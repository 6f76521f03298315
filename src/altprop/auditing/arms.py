"""An arm of an audit: one way to compute a gradient, lent to a model for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import nn

from altprop.auditing.rows import Words
from altprop.conversion.convert import convert, revert, rules_off
from altprop.equilibrium.estimators.estimator import AbstractEstimator
from altprop.equilibrium.module import equilibria, using
from altprop.equilibrium.solvers.solver import AbstractSolver
from altprop.errors import ConfigError, RuleError
from altprop.rule import AbstractRule, Seam


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


@dataclass(frozen=True)
class Installed(AbstractArm):
    """Take a model by the rules that it is converted to already, feedback that it has learned too.

    This is the arm for a look at a model while it trains; feedback itself is not compared.

    **Arguments:** `exact`, whether its rules stand aside, for a reference; `name`, for tables.
    """

    exact: bool = False
    name: str | None = None

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        return rules_off(model) if self.exact else nullcontext()

    def identity(self, model: nn.Module) -> Hashable:
        return self.exact

    def describe(self) -> Words:
        return Words(self.name or ("exact" if self.exact else "its rules"), repr(self), None)


# How a bare rule becomes an arm. A new seam adds its arm here, and nothing else changes.
_ARMS: dict[Seam, Callable[[Any], AbstractArm]] = {
    "adjoint": Arm,
    "transport": RuleArm,
    "broadcast": RuleArm,
}


def as_arm(value: Any, what: str) -> AbstractArm:
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


def _brief(value: Any) -> str:
    """Write a dataclass as a call with the arguments that are not its defaults."""
    changed = [
        f"{f.name}={getattr(value, f.name)!r}"
        for f in fields(value)
        if f.default is MISSING or getattr(value, f.name) != f.default
    ]
    return f"{type(value).__name__}({', '.join(changed)})" if changed else type(value).__name__
