"""What one arm's gradient is, what it takes, and how far it is from finite differences."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from altprop.auditing.arms import AbstractArm, as_arm
from altprop.auditing.memory import peak_live_bytes
from altprop.auditing.rows import Cost, Measured
from altprop.conversion.learned import feedback_parameters
from altprop.equilibrium.estimators.problem import Certificate
from altprop.equilibrium.module import equilibria
from altprop.errors import ConfigError
from altprop.rule import AbstractRule

Loss = Callable[[], Tensor]

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """One model and one loss of it: `loss()` computes a scalar from the model as it then is."""

    model: nn.Module
    loss: Loss
    name: str


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
    arm, trial = as_arm(rule, "rule"), Trial(model, loss, "finite differences")
    leaves = trainable(model)
    for name, leaf in leaves.items():
        if leaf.dtype != torch.float64:
            raise ConfigError(
                f"{name} is {leaf.dtype}: finite differences mean something in float64 only, "
                "write model.double()"
            )
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    with untouched(model) as restore:
        gradients, _ = measured_gradients(trial, arm)

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


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
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


def trainable(model: nn.Module) -> Gradients:
    """Return the trainable parameters by name, the common start of their names left out.

    Learned feedback is none of them: what moves it is no gradient of the loss.
    """
    feedback = {id(p) for p in feedback_parameters(model)}
    named = model.named_parameters()
    leaves = {name: p for name, p in named if p.requires_grad and id(p) not in feedback}
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


def measured_gradients(
    trial: Trial, arm: AbstractArm, by: Callable[[str], str] | None = None
) -> tuple[Gradients, Measured]:
    """Return the gradients, and what the certificates of all solves say once they are there.

    **Arguments:** `by`, the part that a parameter belongs to: its gradients make one vector.
    """
    certificates: list[Certificate] = []

    def keep(module: Any, _: Any, __: Any) -> None:
        certificates.append(module.certificate)

    leaves = trainable(trial.model)  # before an arm adds its own
    hooks = [module.register_forward_hook(keep) for _, module in equilibria(trial.model)]
    try:
        with arm.applied(trial.model):
            gradients = _gradients(trial, leaves)
    finally:
        for hook in hooks:
            hook.remove()
    if by is not None:
        parts: dict[str, list[Tensor]] = {}
        for name, gradient in gradients.items():
            parts.setdefault(by(name), []).append(gradient.flatten())
        gradients = {part: torch.cat(found) for part, found in parts.items()}
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


def costs_of(
    trial: Trial, arms: Sequence[AbstractArm], repeats: int, restore: Callable[[], None]
) -> list[Cost]:
    """Time the arms in turn, so that what disturbs the machine disturbs all of them alike."""
    leaves = trainable(trial.model)
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
