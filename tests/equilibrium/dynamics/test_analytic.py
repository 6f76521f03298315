"""The complex continuations: equal on real input, analytic nearby, accurate."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

from altprop.equilibrium.dynamics import analytic
from systems import system

KINDS = ["damped", "gated", "thick", "thick, rms and qk-norm"]


def complexes(*shape: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = size * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


def agree(found: Tensor, wanted: list[mpmath.mpc]) -> bool:
    pairs = zip(found.tolist(), map(complex, wanted), strict=True)
    return max(abs(f - e) / abs(e) for f, e in pairs) < 1e-12


@pytest.mark.parametrize("size", [1e-8, 1e-3, 0.3, 1.0, 3.0])
def test_erf_agrees_with_arbitrary_precision_and_is_odd(size: float) -> None:
    z = complexes(60, size=size)
    z[::5] = z[::5].real.to(z.dtype)
    z[1::5] = 1j * z[1::5].imag
    assert agree(analytic.erf(z), [mpmath.erf(mpmath.mpc(v)) for v in z.tolist()])
    assert torch.equal(analytic.erf(-z), -analytic.erf(z))
    assert analytic.erf(torch.zeros_like(z[:1])) == 0


@pytest.mark.parametrize("size", [0.1, 1.0, 2.0])
def test_gelu_softmax_and_layer_norm_agree_with_arbitrary_precision(size: float) -> None:
    z = complexes(40, size=size)
    one, zero = torch.ones(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    with mpmath.workdps(40):  # 1 + erf cancels on the left
        values = [mpmath.mpc(v) for v in z.tolist()]
        gelu = [v * (1 + mpmath.erf(v / mpmath.sqrt(2))) / 2 for v in values]
        exps = [mpmath.exp(v) for v in values]
        softmax = [e / mpmath.fsum(exps) for e in exps]
        mean = mpmath.fsum(values) / 40
        variance = mpmath.fsum((v - mean) ** 2 for v in values) / 40
        normed = [(v - mean) / mpmath.sqrt(variance + mpmath.mpf(1e-5)) for v in values]
    assert agree(analytic.gelu(z), gelu)
    assert agree(analytic.softmax(z), softmax)
    assert agree(analytic.layer_norm(z, one, zero, 1e-5), normed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_analytic_force_is_the_force_on_real_states_and_analytic_around_them(
    kind: str,
) -> None:
    s = system(kind, seed=0, tokens=4)
    force = lambda z: s.dynamics.analytic(z, s.x).detach()  # noqa: E731
    z, v, w = torch.randn(3, *s.x.shape, dtype=torch.float64)
    on_reals = force(torch.complex(z, torch.zeros_like(z)))
    torch.testing.assert_close(on_reals.real, s.dynamics(z, s.x).detach(), rtol=1e-13, atol=1e-13)
    assert not on_reals.imag.any()
    # by a complex step it has the Jacobian
    found = force(torch.complex(z, 1e-30 * v)).imag / 1e-30
    torch.testing.assert_close(found, s.dynamics.linearise(z, s.x).jvp(v), rtol=1e-11, atol=1e-11)
    # off the real axis it satisfies Cauchy and Riemann
    z, h = torch.complex(s.x, 0.1 * w), 1e-6
    along, across = ((force(z + h * d * v) - force(z - h * d * v)) / (2 * h * d) for d in (1, 1j))
    torch.testing.assert_close(across, along, rtol=1e-7, atol=1e-7)
