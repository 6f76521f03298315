"""One call of an `Equilibrium`: its free phase, the record, and what the backward pass may ask."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from altprop.equilibrium.dynamics.conduct import Draws, refuse_sharded
from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.equilibrium.dynamics.products import AbstractLinearisation
from altprop.equilibrium.dynamics.surroundings import version_of
from altprop.equilibrium.dynamics.system import System
from altprop.equilibrium.estimators.problem import (
    Adjoint,
    Certificate,
    Cost,
    Problem,
    quietly,
)
from altprop.equilibrium.solvers.landing import Landing, land
from altprop.equilibrium.solvers.solver import (
    AbstractSolver,
    Result,
    conclude,
    relative_residual,
)
from altprop.errors import ConvergenceError, RuleError

OnFailure = Literal["raise", "warn", "accept"]


class Call:
    """One call of an `Equilibrium`, which its estimator's `attach` works on.

    **Arguments:** `dynamics`; `system`, the same under this call's input; `solver`, of the free
    phase; `policy`, what to do when a solve misses its tolerance; `cost`, `C` of what the module
    gives out, where the caller gave it; `keep`, which takes the certificate of the call.
    """

    def __init__(
        self,
        dynamics: AbstractDynamics,
        system: System,
        solver: AbstractSolver,
        policy: OnFailure,
        cost: Cost | None,
        keep: Callable[[Certificate], None],
    ) -> None:
        self.system, self.solver = system, solver
        self._dynamics = dynamics
        self._held = tuple((p, version_of(p)) for p in dynamics.parameters())
        self._policy, self._cost, self._keep = policy, cost, keep
        self._linearised: Callable[[], AbstractLinearisation] | None = None
        self._loss_draws: Draws | None = None

    def free(self) -> Landing:
        """Return the free state and the force there, recorded wherever autograd is on."""
        refuse_sharded(self._dynamics)
        settled = self.system.settled()
        if settled is not None:
            state, force = settled
            self._linearised = partial(self.system.linearise, state)
            residual = relative_residual(state - state, state, None)  # NaN where it is not finite
            result = conclude(residual, self.solver.tol or 1.0)
            stride = torch.full_like(residual, self.system.step)
            return Landing(state, force, residual, residual, stride, 1, result)
        found = land(
            self.solver,
            partial(quietly, self.system.force),
            self.system.start().detach(),
            step=self.system.step,
            record=self._record,
        )
        if found.apart and not self.system.fresh:
            raise RuleError(
                "the force that autograd records is another one than the force that was solved "
                f"(at the same state its residual is {float(found.residual.max()):.1e}, and was "
                f"at most {self.solver.tol:.0e}), expected one that does not depend on "
                "torch.is_grad_enabled(): an nn.TransformerEncoder in eval() zeros padded places "
                "where nothing is recorded, so build it with enable_nested_tensor=False"
            )
        return found

    def _record(self, z: Tensor) -> Tensor:
        force, linearise = self.system.record(z)
        if force.requires_grad:
            self.system.check_apart(z, linearise)
        self._linearised = linearise
        return force

    @contextmanager
    def problem(self, free: Landing) -> Iterator[Problem]:
        """Give the adjoint problem at the free state, which is that of the call inside."""
        self._refuse_others()
        assert self._linearised is not None
        z, still = free.state, free.force.detach()
        with self.system.recalled():
            if self.system.coarse:
                still = quietly(self.system.force, z)
            cost = self._read_cost()
            yield Problem(self.system, self.solver, z, still, self._linearised, free.value, cost)

    def _refuse_others(self) -> None:
        """Refuse parameters that are not those of the forward pass, or hold other numbers."""
        now = zip(self._held, self._dynamics.named_parameters(), strict=True)
        changed = []
        for (p, version), (name, q) in now:
            if p is not q:
                raise RuleError(
                    "the dynamics' parameters are not those of the forward pass (functional_call "
                    "puts its own in place only until the call returns), so the adjoint would be "
                    "that of another system: load them with load_state_dict, or use BPTT()"
                )
            if version_of(p) != version:
                changed.append(name)
        if changed:
            raise RuleError(
                f"parameters of the dynamics changed in place after the forward pass "
                f"({', '.join(changed)}), so the adjoint would be that of another system: step the "
                "optimiser after backward, and call the block anew after a step"
            )

    def leave(self) -> None:
        """Remember what the loss will draw, which follows the module's call: dropout's masks, say.

        A cost that drew others in the backward pass would be another loss in every evaluation.
        """
        if self._cost is not None:
            self._loss_draws = Draws(self.system.x.device)

    def _read_cost(self) -> Cost | None:
        """Turn the cost of what the module gives out into one of the whole state."""
        cost, read, draws = self._cost, self.system.read, self._loss_draws
        if cost is None:
            return None
        assert draws is not None

        def drawn(z: Tensor) -> Tensor:
            with draws.again():
                return cost(read(z))

        return drawn

    def report(self, certificate: Certificate) -> None:
        """Hand over what the free phase measured."""
        certificate.system = self.system.kept()
        self._keep(certificate)

    def complete(
        self, certificate: Certificate, adjoint: Adjoint, cotangent: Tensor, tol: float
    ) -> None:
        """Hand over what the backward pass measured as well, and act as the policy says."""
        certificate.complete(adjoint, cotangent)
        self._keep(certificate)  # a recomputation (checkpointing) has put its own in place
        if adjoint.residual is not None:
            settle(self._policy, adjoint.result, adjoint.residual, tol, "adjoint")

    def settle(self, result: Result, residual: Tensor) -> None:
        """Raise, warn or accept what the free phase ended with, as the policy says."""
        settle(self._policy, result, residual, self.solver.tol, "free phase")


def settle(policy: OnFailure, result: Result, residual: Tensor, tol: float, what: str) -> None:
    """Raise, warn or accept where a solve missed its tolerance."""
    if result or policy == "accept":
        return
    text = (
        f"{what}: {result.value} (worst residual {float(residual.max()):.2e}, tolerance "
        f"{tol:.0e}); raise max_steps or tol, stabilise the dynamics (JacobianHinge), or pass "
        "on_failure='accept' and check certificate"
    )
    if policy == "raise":
        raise ConvergenceError(text)
    warnings.warn(text, RuntimeWarning, stacklevel=2)
