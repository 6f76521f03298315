"""The same gradients by other libraries of implicit models, where they are installed.

torchdeq 0.1.0 (`ift=True`) and xitorch 0.5.1 (`equilibrium`):
`pip install --no-deps --target <folder> torchdeq xitorch`, then that folder on PYTHONPATH. They are
given the fixed-point map `z ↦ z + εF(z)`, the same start and nothing else of this library.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from problems import Gradients, Problem

TORCHDEQ = {"fixed point": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}
LIMIT = 100  # evaluations per solve; torchdeq's default of 40 stops some of its solvers short


@dataclass
class Counted:
    """The fixed-point map of a dynamics under an input, which counts what is asked of it."""

    problem: Problem
    evaluations: int = 0
    products: int = 0
    settled: bool = True

    def reset(self) -> None:
        self.evaluations = self.products = 0

    def __call__(self, z: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        dynamics = self.problem.dynamics
        self.evaluations += 1
        if parameters:  # xitorch wants to see them
            names = [name for name, _ in dynamics.named_parameters()]
            given = dict(zip(names, parameters, strict=True))
            force = torch.func.functional_call(dynamics, given, (z, x))
        else:
            force = dynamics(z, x)
        out = z + dynamics.step * force
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, _: Tensor) -> None:
        self.products += 1


def torchdeq_gradient(
    problem: Problem, solver: str, tolerances: tuple[float, float] | None = None
) -> tuple[Callable[[], Gradients], Counted] | None:
    """Return what computes the gradients by torchdeq and its counter; `None` if not installed.

    **Arguments:** `solver`, of both passes; `tolerances`, of the free phase and the adjoint,
    relative to the state and to the adjoint (`None`: torchdeq's defaults throughout).
    """
    try:
        from torchdeq import get_deq
    except ImportError:
        return None
    options: dict[str, object] = {}
    if tolerances is not None:
        free, adjoint = tolerances
        options = {
            "f_tol": free, "b_tol": adjoint, "f_stop_mode": "rel", "b_stop_mode": "rel",
            "f_max_iter": LIMIT, "b_max_iter": LIMIT,
        }  # fmt: skip
    deq = get_deq(ift=True, f_solver=solver, b_solver=solver, **options).train()
    step = Counted(problem)

    def run() -> Gradients:
        step.reset()

        def forward(x: Tensor) -> Tensor:
            return deq(lambda z: step(z, x), x.detach())[0][-1]

        return problem.differentiate(forward, problem.dynamics)

    return run, step


def xitorch_gradient(
    problem: Problem, tolerances: tuple[float, float] = (1e-4, 1e-4)
) -> tuple[Callable[[], Gradients], Counted] | None:
    """Return what computes the gradients by xitorch and its counter; `None` if not installed.

    Anderson's method forwards; bicgstab backwards, which is what xitorch takes by itself.

    **Arguments:** `tolerances`, of the free phase and the adjoint, relative to their first
    residuals: xitorch's own are absolute and below what float32 reaches.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xitorch.optimize import equilibrium
    except ImportError:
        return None
    dynamics, step = problem.dynamics, Counted(problem)
    forwards = {"method": "anderson_acc", "feat_ndims": 2, "maxiter": LIMIT}
    forwards |= {"f_tol": math.inf, "x_tol": math.inf, "f_rtol": tolerances[0]}
    backwards = {"method": "bicgstab", "rtol": tolerances[1], "max_niter": LIMIT}

    def forward(x: Tensor) -> Tensor:
        return equilibrium(
            lambda z, x, *parameters: step(z, x, *parameters),  # it refuses other callables
            x.detach(),
            params=(x, *dynamics.parameters()),
            bck_options=backwards,
            **forwards,
        )

    def run() -> Gradients:
        step.reset()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            gradients = problem.differentiate(forward, dynamics)
        step.settled = not any("converge" in str(warning.message) for warning in heard)
        return gradients

    return run, step
