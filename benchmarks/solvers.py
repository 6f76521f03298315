"""What each solver does on fixed points that are hard to reach: a committed table.

Run `python benchmarks/solvers.py`; it writes `results/solvers.md` and `results/solvers.json` beside
itself. Every system is seeded, small and in float64, so that its whole spectrum can be computed: a
fixed point with an eigenvalue of positive real part exists and can be solved for, and yet no
physical relaxation would ever stay there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import altprop as ap

TOL, LIMIT = 1e-8, 2000

SOLVERS: dict[str, ap.AbstractSolver] = {
    "Euler(0.1)": ap.Euler(step=0.1, tol=TOL, max_steps=LIMIT),
    "Adaptive": ap.Adaptive(tol=TOL, max_steps=LIMIT),
    "Anderson": ap.Anderson(tol=TOL, max_steps=LIMIT),
    "NewtonKrylov": ap.NewtonKrylov(tol=TOL, max_steps=LIMIT),
    "Fallback": ap.Fallback(tol=TOL, max_steps=5 * LIMIT),  # it may seek from other starts too
}


@dataclass(frozen=True)
class Case:
    """A seeded system: its force on states `(B, n)`, where to start, and its natural step."""

    name: str
    force: Callable[[Tensor], Tensor]
    start: Tensor
    step: float = 1.0
    has_fixed_point: bool = True


def cases() -> Iterator[Case]:
    """Yield every system of the table."""
    for seed, gap in enumerate((1e-2, 1e-3, 1e-4)):
        yield prescribed(f"near-critical, Re μ = −{gap:g}", seed, real=[-gap])
    for seed, turn in enumerate((3.0, 10.0, 30.0)):
        yield prescribed(f"rotating, μ = −0.2 ± {turn:g}i", seed, pairs=[(-0.2, turn)])
    yield prescribed(
        "rotating, eight frequencies", 3, pairs=[(-0.05, 2.0 * k) for k in range(1, 9)]
    )
    for seed, push in enumerate((0.05, 0.5, 2.0)):
        yield prescribed(f"unstable, Re μ = +{push:g}", seed, real=[push])
    yield prescribed("unstable and rotating, μ = +0.3 ± 3i", 4, pairs=[(0.3, 3.0)])
    yield prescribed("three unstable directions", 5, real=[1.0, 0.5], pairs=[(0.2, 2.0)], bend=0.3)
    for seed, scale, damping in ((1, 8.0, 1.0), (1, 8.0, 0.7), (0, 32.0, 0.7), (1, 32.0, 0.7)):
        yield attention(f"damped attention, s = {scale:g}, c = {damping:g}", seed, scale, damping)
    # The damping no longer holds the feedback. That a fixed point exists is known only from many
    # random starts (26 of 100 Newton solves find one for the first sample, 23 for the second).
    yield attention("damped attention, s = 4, c = 0.1: not dissipative", 0, 4.0, 0.1)
    yield Case(
        "no fixed point, F = 1 + z²",
        lambda z: 1 + z * z,
        torch.full((2, 4), 0.5, dtype=torch.float64),
        has_fixed_point=False,
    )


def prescribed(
    name: str,
    seed: int,
    real: list[float] | None = None,
    pairs: list[tuple[float, float]] | None = None,
    bend: float = 0.5,
) -> Case:
    """Return a system with these eigenvalues at a fixed point, the others in −1 ± 0.2.

    `F(z) = J d + bend · U (tanh(V d) − V d)` with `d = z − z₀`: curved, and `J` at `z₀` is as said.
    The basis of `J` is not orthogonal, so it is not normal either.
    """
    generator = torch.Generator().manual_seed(seed)
    B, n = 2, 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    block = torch.diag(-1 + 0.2 * draw(n).clamp(-1, 1))
    at = 0
    for mu in real or []:
        block[at, at] = mu
        at += 1
    for a, b in pairs or []:
        block[at : at + 2, at : at + 2] = torch.tensor([[a, b], [-b, a]])
        at += 2
    basis = torch.linalg.qr(draw(n, n))[0] + 0.1 * draw(n, n)
    jacobian = basis @ block @ torch.linalg.inv(basis)
    u, v = draw(n, n) / math.sqrt(n), draw(n, n) / math.sqrt(n)
    point = draw(B, n)

    def force(z: Tensor) -> Tensor:
        d = z - point
        w = d @ v.T
        return d @ jacobian.T + bend * (torch.tanh(w) - w) @ u.T

    return Case(name, force, point + draw(B, n) / math.sqrt(n))


def attention(name: str, seed: int, scale: float, damping: float) -> Case:
    """Return damped attention with a feedback so strong that its relaxation may not settle."""
    generator = torch.Generator().manual_seed(seed)
    B, T, C = 2, 4, 8
    dynamics = ap.DampedAttention(C, heads=2, scale=scale, damping=damping).double()
    with torch.no_grad():
        for p in dynamics.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(C))
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64)

    def force(z: Tensor) -> Tensor:
        with torch.no_grad():
            return dynamics(z.view(B, T, C), x).flatten(1)

    return Case(name, force, x.flatten(1), dynamics.step)


def abscissa(case: Case, z: Tensor) -> float:
    """Return the largest real part of the eigenvalues of `J` at `z`, over the samples.

    `J` by central differences, whose error, about 1e-9, is far below the figures of the table.
    """
    h, worst = 1e-5, -math.inf
    columns = []
    for i in range(z.shape[1]):
        e = torch.zeros_like(z)
        e[:, i] = h
        columns.append((case.force(z + e) - case.force(z - e)) / (2 * h))
    for jacobian in torch.stack(columns, 2):
        worst = max(worst, float(torch.linalg.eigvals(jacobian).real.max()))
    return worst


def measure(case: Case) -> dict[str, object]:
    """Return what every solver does on one system."""
    row: dict[str, object] = {"case": case.name, "has_fixed_point": case.has_fixed_point}
    solved = {}
    for name, solver in SOLVERS.items():
        solution = solver.solve(case.force, case.start, step=case.step)
        solved[name] = solution
        row[name] = {
            "result": solution.result.name,
            "residual": float(solution.residual.max()),
            "evaluations": solution.evaluations,
        }
    found = solved["Fallback"]
    if found.result is ap.Result.CONVERGED:
        row["abscissa"] = top = abscissa(case, found.value)
        row["reachable"] = top < 0
    return row


def markdown(rows: list[dict[str, object]]) -> str:
    """Return the table."""
    lines = [
        f"Evaluations of the force to a relative residual of {TOL:g} for every sample; — : not "
        f"within {LIMIT} evaluations (the chain: {5 * LIMIT}); ∞ : the state ran away. Re μ: the "
        "largest real part of the "
        "eigenvalues at the point that the fallback chain found.",
        "",
        "| system | " + " | ".join(SOLVERS) + " | Re μ | reachable by relaxation |",
        "|---|" + "---|" * (len(SOLVERS) + 2),
    ]
    for row in rows:
        cells = []
        for name in SOLVERS:
            entry = row[name]
            assert isinstance(entry, dict)
            mark = {"CONVERGED": str(entry["evaluations"]), "NON_FINITE": "∞"}
            cells.append(mark.get(entry["result"], "—"))
        top = row.get("abscissa")
        cells.append("" if top is None else f"{top:+.2g}")
        reachable = row.get("reachable")
        cells.append("" if reachable is None else "yes" if reachable else "**no**")
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [measure(case) for case in cases()]
    where = Path(__file__).parent / "results"
    where.mkdir(exist_ok=True)
    table = markdown(rows)
    (where / "solvers.md").write_text("# Solvers on hard fixed points\n\n" + table)
    (where / "solvers.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
