"""Forces whose natural step is too long: what is solved otherwise is not undone by a last step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import altprop as ap
from altprop.equilibrium.estimators.problem import step_on
from systems import randn, size, tensor

B, N = 3, 6
CHAIN = ap.Fallback((ap.Anderson(max_steps=15), ap.NewtonKrylov()))
SOLVERS = [(ap.NewtonKrylov(), None), (ap.Fallback(), ap.GMRES()), (CHAIN, None)]
ESTIMATORS = [
    ap.Implicit(),
    ap.AEP(),
    ap.AEP(sides=1),
    ap.AEP(beta=1e-3),
    ap.AEP(beta=1e-4, sides=1),
    ap.AEP(beta=1e-3, sides=4),
    ap.EP(),
    ap.EP(sides=1, response=1e-4),
    ap.HolomorphicEP(radius=1e-2),
]


class Stiff(ap.AbstractDynamics):
    """`F = k(x − z + tanh(zWᵀ)W / 2)`, with a symmetric Jacobian, so that EP is exact too."""

    def __init__(self, k: float) -> None:
        super().__init__()
        W = randn(N, N, seed=1)
        self.k, self.W = k, nn.Parameter(W / torch.linalg.matrix_norm(W, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.k * (x - z + torch.tanh(z @ self.W.to(z.dtype).T) @ self.W.to(z.dtype) / 2)

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        return self(z, x)

    def jacobian(self, z: Tensor) -> Tensor:
        """Return `∂F/∂z` of each sample, `(B, n, n)`."""
        slope = 1 - torch.tanh(z @ self.W.T) ** 2
        inner = torch.einsum("mi,bm,mj->bij", self.W, slope, self.W) / 2
        return self.k * (inner - torch.eye(N, dtype=z.dtype))


@dataclass
class Pass:
    """One forward and backward pass: what came out, the adjoint, and what there is to bound."""

    given: Tensor
    a: Tensor
    wanted: Tensor
    amplified: Tensor
    said: ap.Certificate


def backward(k: float, solver: ap.AbstractSolver, estimator: ap.AbstractEstimator) -> Pass:
    dynamics, x, g = Stiff(k), randn(B, N, seed=2).requires_grad_(), randn(B, N, seed=3)
    block = ap.Equilibrium(dynamics, solver, estimator)
    z = block(x)
    z.backward(g)
    said = block.certificate
    inverse = torch.linalg.inv(dynamics.jacobian(said.state).detach())
    wanted = -torch.einsum("bij,bj->bi", inverse.mT, g)
    amplified = torch.linalg.matrix_norm(inverse, 2) * size(g) / size(wanted)
    left = size(dynamics(z, x).detach()) / size(z.detach())
    return Pass(left, x.grad / k, wanted, amplified, said)


@pytest.mark.parametrize("k", [1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize(("solver", "own"), SOLVERS, ids=["newton", "gmres", "chain"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_residuals_bound_the_errors_of_what_comes_out_however_long_the_natural_step(
    estimator: ap.AbstractEstimator, solver: ap.AbstractSolver, own: ap.AbstractSolver, k: float
) -> None:
    done = backward(k, solver, replace(estimator, solver=own, max_steps=400))
    assert done.said.result and done.said.adjoint_result
    # the state that is given out is within the tolerance, and so is the recorded one
    assert float(done.given.max()) <= solver.tol
    assert float(done.said.free_residual.max()) <= solver.tol
    error = size(done.a - done.wanted) / size(done.wanted)
    assert bool((error <= 1.5 * done.amplified * done.said.adjoint_residual).all())


def test_a_step_that_is_free_is_taken_by_the_samples_that_it_suits_alone() -> None:
    value, g = tensor(1.0, 0.1).view(2, 1), tensor(1.0, 1.0).view(2, 1)
    force = 1e-3 * g
    found = ap.Solution(value, force, size(force), 1, ap.Result.CONVERGED, torch.ones(2).double())
    assert step_on(found, ()).flatten().tolist() == [1.001, 0.1]
    # a shorter one suits both, and none is taken where the solver knows of none
    assert step_on(found, (), 0.1).flatten().tolist() == pytest.approx([1.0001, 0.1001])
    none = replace(found, stride=torch.zeros(2).double())
    assert torch.equal(step_on(none, (), 0.1), value)
    # what is lost stays visible
    lost = replace(found, force=force * torch.nan, residual=found.residual * torch.nan)
    assert bool(step_on(lost, ()).isnan().all())
