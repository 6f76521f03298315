"""The complex continuations: equal on real input, analytic nearby, accurate."""

from __future__ import annotations

import mpmath
import pytest
import torch
from instances import system
from torch import Tensor

from altprop.equilibrium.dynamics import analytic

KINDS = ["damped", "gated", "thick", "thick, rms and qk-norm"]


def complexes(*shape: int, size: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = size * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return torch.complex(parts[0], parts[1])


@pytest.mark.parametrize("size", [1e-8, 1e-3, 0.3, 1.0, 3.0])
def test_erf_agrees_with_arbitrary_precision(size: float) -> None:
    z = complexes(60, size=size)
    z[::5] = z[::5].real.to(z.dtype)
    z[1::5] = 1j * z[1::5].imag
    expected = [complex(mpmath.erf(mpmath.mpc(v))) for v in z.tolist()]
    found = analytic.erf(z).tolist()
    assert max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True)) < 1e-12


def test_gelu_agrees_with_arbitrary_precision() -> None:
    z = complexes(100, size=2.0)
    with mpmath.workdps(40):  # 1 + erf cancels on the left
        expected = [
            complex(v * (1 + mpmath.erf(mpmath.mpc(v) / mpmath.sqrt(2))) / 2) for v in z.tolist()
        ]
    found = analytic.gelu(z).tolist()
    assert max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True)) < 1e-12


def test_erf_is_zero_at_zero_and_odd() -> None:
    z = complexes(20, size=1.0)
    assert analytic.erf(torch.zeros(1, dtype=torch.complex128)) == 0
    assert torch.equal(analytic.erf(-z), -analytic.erf(z))


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_softmax_and_layer_norm_agree_with_arbitrary_precision(size: float) -> None:
    z = complexes(5, size=size)
    exps = [mpmath.exp(mpmath.mpc(v)) for v in z.tolist()]
    mean = mpmath.fsum(z.tolist()) / 5
    centred = [mpmath.mpc(v) - mean for v in z.tolist()]
    deviation = mpmath.sqrt(mpmath.fsum(c * c for c in centred) / 5 + mpmath.mpf(1e-5))
    one, zero = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for found, expected in (
        (analytic.softmax(z), [e / mpmath.fsum(exps) for e in exps]),
        (analytic.layer_norm(z, one, zero, 1e-5), [c / deviation for c in centred]),
    ):
        for f, e in zip(found.tolist(), expected, strict=True):
            assert abs(f - complex(e)) < 1e-12 * abs(complex(e))


@pytest.mark.parametrize("kind", KINDS)
def test_the_analytic_force_is_the_force_on_real_states(kind: str) -> None:
    s = system(kind, seed=0, tokens=4)
    z = torch.randn_like(s.x)
    found = s.dynamics.analytic(torch.complex(z, torch.zeros_like(z)), s.x).detach()
    torch.testing.assert_close(found.real, s.dynamics(z, s.x), rtol=1e-13, atol=1e-13)
    assert float(found.imag.abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_analytic_force_has_the_jacobian_of_the_force_by_a_complex_step(kind: str) -> None:
    s = system(kind, seed=1, tokens=4)
    z, v = torch.randn_like(s.x), torch.randn_like(s.x)
    found = s.dynamics.analytic(torch.complex(z, 1e-30 * v), s.x).imag / 1e-30
    torch.testing.assert_close(found, s.dynamics.linearise(z, s.x).jvp(v), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_analytic_force_satisfies_cauchy_and_riemann_off_the_real_axis(kind: str) -> None:
    s = system(kind, seed=2)
    z, v = torch.complex(s.x, 0.1 * s.w), torch.randn_like(s.x)
    h = 1e-6

    def slope(d: complex) -> Tensor:
        return (
            s.dynamics.analytic(z + h * d * v, s.x) - s.dynamics.analytic(z - h * d * v, s.x)
        ) / (2 * h * d)

    torch.testing.assert_close(slope(1j), slope(1), rtol=1e-7, atol=1e-7)
