"""A user's own force as a dynamics: write the formula, and every estimator and solver applies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from altprop.equilibrium.dynamics.closures import held_by
from altprop.equilibrium.dynamics.conduct import check_draws
from altprop.equilibrium.dynamics.dynamics import AbstractDynamics
from altprop.errors import ConfigError


def from_function(
    force: Callable[..., Tensor],
    *modules: nn.Module,
    step: float = 1.0,
    start: Callable[[Tensor], Tensor] | None = None,
    draws: bool | Literal["replayed", "fresh"] = False,
    **parameters: nn.Parameter,
) -> AbstractDynamics:
    """Return the dynamics whose force is `force(z, x)`.

    The force may be an `nn.Module`, close over modules, which are then given too so that their
    parameters are found, or take parameters by name. Its Jacobian's products come from automatic
    differentiation, so any torch code with a forward-mode derivative or a second one will do (an
    energy's gradient by `torch.autograd.grad` has the second); where a closed form is cheaper,
    derive from `AbstractDynamics` and override `linearise`. Samples lie on axis 0 and must not
    interact, and an evaluation must not change a buffer (batch norm does both).

    **Arguments:** `force`, from the state and the input, `(B, ...)` both, to the force, in the
    state's shape; `modules`, those that `force` closes over; `step`, the `ε` for which `z + εF(z)`
    is the natural fixed-point map; `start`, from the input to the first state (default: the input
    itself, which then has the state's shape); `draws`, what random numbers in the force mean:
    `"replayed"`, the same ones in every evaluation of a call, as dropout's are without being asked,
    or `"fresh"`, noise that is new in each, which needs a solver of plain steps (`Euler`,
    `FixedPoint`); `parameters`, passed to every call by name.

    **Raises:** `ConfigError` if the force closes over trainable parameters that were not given:
    by name, through a helper, a method's object, a partial function or a container.
    When it is called, `RuleError` for one in which samples interact or buffers change.

    ```python
    W = nn.Linear(8, 8)
    dynamics = from_function(lambda z, x: x - z + 0.5 * torch.tanh(W(z)), W)
    ```
    """
    return _FunctionDynamics(force, modules, step, start, draws, parameters)


class _FunctionDynamics(AbstractDynamics):
    def __init__(
        self,
        force: Callable[..., Tensor],
        modules: tuple[nn.Module, ...],
        step: float,
        start: Callable[[Tensor], Tensor] | None,
        draws: bool | Literal["replayed", "fresh"],
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
        check_draws(draws)
        self.step, self.draws = step, draws
        self._force, self._start = force, start  # a module among them is registered by this
        self._held = nn.ModuleList(modules)
        self._passed = nn.ParameterDict()
        self._places = {}  # the names that `force` has for them, and those that they have here
        for name, p in parameters.items():
            self._places[name] = place = _free(name, self._passed)
            self._passed[place] = p
        _refuse_forgetting(force, {id(p) for p in self.parameters()})

    def forward(self, z: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        passed = {name: self._passed[place] for name, place in self._places.items()}
        return self._force(z, x, *args, **passed, **kwargs)

    def uses(self) -> Iterable[nn.Module]:
        yield from self.modules()
        for _, value in held_by(self._force):
            if isinstance(value, nn.Module):
                yield from value.modules()

    def start(self, x: Tensor) -> Tensor:
        return x if self._start is None else self._start(x)

    def extra_repr(self) -> str:
        return f"{getattr(self._force, '__name__', type(self._force).__name__)}, step={self.step}"


def _free(name: str, holder: nn.Module) -> str:
    """Return a name that a module can have a parameter by: not a path, nor one that it has."""
    place = name.replace(".", "_")
    while hasattr(holder, place):
        place += "_"
    return place


def _refuse_forgetting(force: Callable[..., Tensor], known: set[int]) -> None:
    """Refuse a function whose surroundings hold trainable parameters that are not known."""
    modules: list[str] = []
    parameters: list[str] = []
    for name, value in held_by(force):
        held = list(value.parameters()) if isinstance(value, nn.Module) else [value]
        if any(p.requires_grad and id(p) not in known for p in held):
            (modules if isinstance(value, nn.Module) else parameters).append(name)
    if not modules and not parameters:
        return
    ways = [f"from_function(force, {', '.join(modules)})"] if modules else []
    if parameters:
        ways.append(
            f"from_function(force, W={parameters[0]}) for a force that takes W by name, or give "
            "the module that holds it"
        )
    raise ConfigError(
        f"the force closes over {', '.join(modules + parameters)}, whose parameters no optimiser "
        f"would find: write {', and '.join(ways)}"
    )
