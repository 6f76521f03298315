"""A user's own force as a dynamics: write the formula, and every estimator and solver applies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from altprop.equilibrium.dynamics import AbstractDynamics
from altprop.errors import ConfigError


def from_function(
    force: Callable[..., Tensor],
    *modules: nn.Module,
    step: float = 1.0,
    start: Callable[[Tensor], Tensor] | None = None,
    **parameters: nn.Parameter,
) -> AbstractDynamics:
    """Return the dynamics whose force is `force(z, x)`.

    The force may be an `nn.Module`, close over modules, which are then given too so that their
    parameters are found, or take parameters by name. Its Jacobian's products come from automatic
    differentiation, so any torch code with a forward-mode derivative will do; where a closed form
    is cheaper, derive from `AbstractDynamics` and override `linearise`. Samples must not interact.

    **Arguments:** `force`, from the state and the input, `(B, ...)` both, to the force, in the
    state's shape; `modules`, those that `force` closes over; `step`, the `ε` for which `z + εF(z)`
    is the natural fixed-point map; `start`, from the input to the first state (default: the input
    itself, which then has the state's shape); `parameters`, passed to every call by name.

    **Raises:** `ConfigError` if the force closes over trainable parameters that were not given.

    ```python
    W = nn.Linear(8, 8)
    dynamics = from_function(lambda z, x: x - z + 0.5 * torch.tanh(W(z)), W)
    ```
    """
    return _FunctionDynamics(force, modules, step, start, parameters)


class _FunctionDynamics(AbstractDynamics):
    draws = True

    def __init__(
        self,
        force: Callable[..., Tensor],
        modules: tuple[nn.Module, ...],
        step: float,
        start: Callable[[Tensor], Tensor] | None,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        super().__init__()
        if not callable(force):
            raise ConfigError(f"the force is {force!r}, expected a function of (z, x)")
        if not step > 0:
            raise ConfigError(f"step is {step}, expected a number > 0")
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ConfigError(
                    f"{module!r} is no module: pass parameters by name, "
                    "from_function(force, W=nn.Parameter(...))"
                )
        self.step = step
        self._force, self._start = force, start  # a module among them is registered by this
        self._held = nn.ModuleList(modules)
        self._passed = nn.ParameterDict(parameters)
        missing = _trainable_closures(force, {id(p) for p in self.parameters()})
        if missing:
            names = ", ".join(missing)
            raise ConfigError(
                f"the force closes over {names}, whose parameters no optimiser would find: write "
                f"from_function(force, {names})"
            )

    def forward(self, z: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._force(z, x, *args, **self._passed, **kwargs)

    def start(self, x: Tensor) -> Tensor:
        return x if self._start is None else self._start(x)

    def extra_repr(self) -> str:
        return f"{getattr(self._force, '__name__', type(self._force).__name__)}, step={self.step}"


def _trainable_closures(force: Callable[..., Tensor], known: set[int]) -> list[str]:
    """Return the names in a function's surroundings that hold trainable parameters not known."""
    if not inspect.isfunction(force):
        return []
    around = inspect.getclosurevars(force)
    found = []
    for name, value in {**around.globals, **around.nonlocals}.items():
        if isinstance(value, nn.Module):
            held = list(value.parameters())
        else:
            held = [value] if isinstance(value, torch.nn.Parameter) else []
        if any(p.requires_grad and id(p) not in known for p in held):
            found.append(name)
    return found
