"""The same gradients by other libraries of implicit models, where they are installed.

torchdeq 0.1.0 (`ift=True`) and xitorch 0.5.1 (`equilibrium`):
`pip install --no-deps --target <folder> torchdeq xitorch`, then that folder on PYTHONPATH. They are
given the fixed-point map `z ↦ z + εF(z)`, the same start and nothing else of this library.
"""

from __future__ import annotations

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


def xitorch_gradient(problem: Problem) -> tuple[Callable[[], Gradients], Counted] | None:
    """Return what computes the gradients by xitorch and its counter; `None` if not installed.

    Anderson's method forwards; bicgstab backwards, which is what xitorch takes by itself.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from xitorch.optimize import equilibrium
    except ImportError:
        return None
    dynamics, step = problem.dynamics, Counted(problem)
    tol = float(1e-3 * problem.x.norm())  # absolute, and over the batch, as xitorch has it

    def run() -> Gradients:
        step.reset()

        def forward(x: Tensor) -> Tensor:
            return equilibrium(
                lambda z, x, *parameters: step(z, x, *parameters),  # it refuses other callables
                x.detach(), params=(x, *dynamics.parameters()), method="anderson_acc", feat_ndims=2,
                f_tol=tol, maxiter=LIMIT,
                bck_options={"method": "bicgstab", "rtol": 1e-3, "max_niter": LIMIT},
            )  # fmt: skip

        return problem.differentiate(forward, dynamics)

    return run, step
