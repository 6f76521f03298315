"""What stands between a gradient and the weights, so that a run cannot fail quietly.

A step is refused when its loss or gradient is not finite, or when its state or adjoint is past the
limits. A run that has lost its fixed point refuses step after step; it ends, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from altprop import Certificate, ConvergenceError, Result, equilibria
from altprop.lab.gradient import Made, push
from altprop.lab.ranks import Ranks, full
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Progress

SHARE = 10  # of that many times `refused_in_a_row` steps, more than `refused_in_a_row` are too many


def certificates(model: nn.Module) -> list[Certificate]:
    """Return what the equilibria of `model` measured in their last call."""
    return [block.certificate for _, block in equilibria(model) if block.certificate is not None]


def within(limit: float, result: Result | None, residual: Tensor | None) -> bool:
    """Tell whether every residual of a solve is at most `limit`; one that is not finite is not.

    Who asks for a fixed number of steps asks for no residual: there is none to fall short of.
    """
    return residual is None or result is Result.FIXED_TIME or float(residual.max()) <= limit


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of a model's gradient, a scalar; of one in shards it is in shards too."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


class Guard:
    """Judges every step's gradient before it is applied, and lets the stabiliser act.

    **Arguments:** `ranks`, which share every batch; `norm`, of the whole gradient, of which this
    process may hold a part.
    """

    def __init__(
        self,
        config: TrainConfig,
        generator: torch.Generator,
        ranks: Ranks | None = None,
        norm: Callable[[nn.Module], Tensor] = gradient_norm,
    ) -> None:
        self._config, self._ranks, self.norm = config, ranks or Ranks(), norm
        self._why = ""  # the last refusal's reason
        self.state = config.stabiliser.init(generator) if config.stabiliser else None

    def check(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        loss: float,
        progress: Progress,
        passes: Sequence[Made],
    ) -> dict[str, float]:
        """Refuse a gradient of a state that is none, and return what was measured of this step.

        All ranks do the same: what they measured is the worst of all, and the loss the mean.

        **Arguments:** `passes`, those that made the gradient on this rank.
        """
        config, ranks = self._config, self._ranks
        measured = ranks.worst([summary(one.certificates) for one in passes])
        finite = math.isfinite(loss)
        settled = all(self._settled(c) for one in passes for c in one.certificates)
        good = finite and bool(ranks.numbers([float(settled)]).all())
        if not good:
            limits = {
                "free_residual": ("free_limit", config.free_limit),
                "adjoint_residual": ("adjoint_limit", config.adjoint_limit),
                "state_error": ("error_limit", config.error_limit),
            }
            residuals = [
                f"the {name.replace('_', ' ')} {measured[name]:.1e} ({option} {limit:.0e})"
                for name, (option, limit) in limits.items()
                if name in measured
            ]
            self._refuse(", ".join([f"the loss is {loss:.4g}", *residuals]), optimiser, progress)
        if config.stabiliser and finite:
            measured |= push(config, self.state, model, progress.step, not good, passes, ranks)
        norm = full(self.norm(model))
        if not bool(torch.isfinite(norm)):
            if good:
                self._refuse(f"the gradient's norm is {float(norm)}", optimiser, progress)
            optimiser.zero_grad(set_to_none=True)
        return measured

    def lost(self, progress: Progress) -> bool:
        """Tell whether so many steps were refused that the run must not go on."""
        return self._verdict(progress) is not None

    def error(self, progress: Progress, resume: str) -> ConvergenceError:
        """Return the error of a lost run: what was refused, why, and what to change.

        **Arguments:** `resume`, the options that go on with the run.
        """
        verdict = self._verdict(progress)
        assert verdict is not None, "error belongs to a run that is lost"
        what, more = verdict
        why = f" ({self._why})" if self._why else ""
        return ConvergenceError(
            f"the run is lost: {what}{why}: start another with {self._advice()}, or go on all the "
            f"same: altprop train {resume} {more}"
        )

    def _verdict(self, progress: Progress) -> tuple[str, str] | None:
        """Return what shows that a run is lost, and the option that lets it go on."""
        limit, step = self._config.refused_in_a_row, progress.step
        row = progress.in_a_row()
        many = sum(at > step - SHARE * limit for at in progress.recently)
        patience = f"--refused_in_a_row {2 * limit}"
        if row >= limit:
            return f"{row} steps in a row were refused, up to step {step}", patience
        if many > limit:
            window = SHARE * limit
            return f"{many} of the last {window} steps were refused, up to step {step}", patience
        if progress.refused == step == self._config.steps:
            return f"every one of its {step} steps was refused", f"--steps {2 * step}"
        return None

    def _advice(self) -> str:
        if self._config.model != "equilibrium":
            return "a lower lr"
        strict = "a stricter stabiliser (a smaller --stabiliser.target)"
        if self._config.stabiliser is None:
            strict = "a stabiliser (--stabiliser JacobianHinge)"
        return f"a lower lr, {strict} or another solver (--solver Anderson)"

    def _settled(self, seen: Certificate) -> bool:
        """Tell whether a state, its adjoint and what the one leaves to the other are in limits."""
        config = self._config
        return (
            within(config.free_limit, seen.result, seen.free_residual)
            and within(config.adjoint_limit, seen.adjoint_result, seen.adjoint_residual)
            and within(config.error_limit, seen.result, seen.state_error)
        )

    def _refuse(self, why: str, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        step = progress.step + 1
        if self._config.on_failure == "stop":
            raise ConvergenceError(
                f"step {step}: {why}; lower lr, stabilise, or write --on_failure skip"
            )
        self._why = why
        progress.refused += 1
        first = step - SHARE * self._config.refused_in_a_row
        progress.recently = [*(at for at in progress.recently if at > first), step]
        optimiser.zero_grad(set_to_none=True)


def summary(seen: list[Certificate]) -> dict[str, float]:
    """Return the worst residuals and the sums of evaluations over a model's certificates."""
    if not seen:
        return {}
    out = {
        "free_residual": max(float(c.free_residual.max()) for c in seen),
        "free_evaluations": float(sum(c.free_evaluations for c in seen)),
        "adjoint_evaluations": float(sum(c.adjoint_evaluations for c in seen)),
    }
    for name in ("adjoint_residual", "state_error", "nudged_residuals", "antisymmetry",
                 "response", "beta"):  # fmt: skip
        values = [getattr(c, name) for c in seen if getattr(c, name) is not None]
        if values:
            out[name] = max(float(v.max()) for v in values)
    return out
