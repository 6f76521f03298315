"""Bugs of the estimators."""

from __future__ import annotations

from bugs.bug import Bug

_AEP = "equilibrium/estimators/"
_CONTRAST = _AEP + "test_contrast.py"
_EXACT = _AEP + "test_exact.py"
_ADJOINTS = _AEP + "test_adjoints.py"
_NUDGES = _AEP + "test_nudges.py"
_STIFF = _AEP + "test_stiff.py"
_PUBLISHED = _AEP + "test_published.py"
_CIRCLE = _AEP + "test_holomorphic.py"
_LEVELS = "equilibrium/test_levels.py"

BUGS = [
    Bug(
        _AEP + "confirm.py",
        "minus = phases.drive(-1.0, -first) + across",
        "minus = phases.drive(-1.0, -first) - across",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "return (4 * near - pair) / 3",
        "return (4 * near - pair) / 4",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "_SHRINK = 8.0",
        "_SHRINK = 1.0",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "factor = 2 * most.nan_to_num(_SHRINK).pow(1 / 3)",
        "factor = 2 * most.nan_to_num(_SHRINK).pow(1 / 6)",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "hidden = hidden | curved & (beside >= before / 2)",
        "hidden = hidden | curved",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "_ASTRAY = 0.1",
        "_ASTRAY = 1e30",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "floor = torch.where(hidden, beside, floor_of(problem, phases.beta))",
        "floor = floor_of(problem, phases.beta)",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "left = choose(untold, linear.force, seen, widths)",
        "left = seen",
        _CONTRAST,
    ),
    Bug(
        _AEP + "confirm.py",
        "value=step_on(replace(linear, force=left, residual=residual), widths, problem.step),",
        "value=linear.value,",
        _CONTRAST + " " + _EXACT,
    ),
    Bug(
        "equilibrium/levels.py",
        "return norms / torch.maximum(size, 1e-30 * norms)",
        "return norms",
        _CONTRAST + " " + _LEVELS,
    ),
    Bug(
        _AEP + "roundoff.py",
        "ROUNDING = 4.0",
        "ROUNDING = 0.01",
        _CONTRAST,
    ),
    Bug(
        _AEP + "roundoff.py",
        "return ROUNDING * eps * level_norms(problem.state, problem.widths) / beta.unsqueeze(1)",
        "return ROUNDING * eps * level_norms(problem.state, problem.widths) * beta.unsqueeze(1)",
        _CONTRAST,
    ),
    Bug(
        "equilibrium/levels.py",
        "return torch.stack([sample_norm(part) for part in v.split(widths, -1)], 1)",
        "return sample_norm(v).unsqueeze(1).expand(-1, len(widths))",
        _CONTRAST,
    ),
    Bug(
        "equilibrium/levels.py",
        "unit = per_level(_powers(size), start, widths)",
        "unit = torch.ones_like(start)",
        _LEVELS,
    ),
    Bug(
        "equilibrium/levels.py",
        "residual = worst_level(left, value, widths)",
        "residual = sample_norm(left)",
        _LEVELS,
    ),
    Bug(
        "equilibrium/levels.py",
        "return inverse(r * unit) / unit",
        "return inverse(r)",
        _LEVELS,
    ),
    Bug(
        "equilibrium/levels.py",
        "left = torch.where(per_sample(unsolved, start), found.force, left)",
        "left = found.force",
        _LEVELS,
    ),
    Bug(
        "equilibrium/levels.py",
        "at = start if v is begin else v * unit",
        "at = v * unit",
        _LEVELS,
    ),
    Bug(
        _AEP + "pair.py",
        "return left, torch.maximum(solution.residual, hidden), result",
        "return left, solution.residual, result",
        _LEVELS,
    ),
    Bug(
        _AEP + "pair.py",
        "lambda u: loud(shown(u), floor, widths), start, torch.ones_like(phases.beta)",
        "shown, start, torch.ones_like(phases.beta)",
        _LEVELS,
    ),
    Bug(
        _AEP + "one_step.py",
        "residual=worst_level(term, value, problem.widths) if self.certify else None,",
        "residual=worst_level(term, value, ()) if self.certify else None,",
        _LEVELS,
    ),
    Bug(
        _AEP + "published.py",
        "residual = relative_to_levels(shown, beta * value, problem.widths).amax(1)",
        "residual = shown.amax(1)",
        _LEVELS,
    ),
    Bug(
        _AEP + "pair.py",
        "weight = phases.tol**0.5",
        "weight = 1.0",
        _CONTRAST,
    ),
    Bug(
        _AEP + "pair.py",
        "plus = phases.drive(1.0, m - a) - (of_m - of_a)",
        "plus = phases.drive(1.0, m - a) - (of_m + of_a)",
        _EXACT,
    ),
    Bug(
        _AEP + "pair.py",
        "minus = phases.drive(-1.0, m + a) - (of_m + of_a)",
        "minus = phases.drive(-1.0, a) - of_a",
        _EXACT,
    ),
    Bug(
        _AEP + "phases.py",
        "beta = response * torch.where(state > 0, state, 1.0) / size.clamp_min(tiny)",
        "beta = response * state.clamp_min(tiny) / size.clamp_min(tiny)",
        _CIRCLE,
    ),
    Bug(
        _AEP + "phases.py",
        "value=(4 * near.value - far.value) / 3,",
        "value=(4 * near.value + far.value) / 5,",
        _EXACT,
    ),
    Bug(
        _AEP + "phases.py",
        "return replace(self, beta=self.beta / 2)",
        "return replace(self, beta=self.beta)",
        _EXACT,
    ),
    Bug(
        _AEP + "phases.py",
        "return (self.problem.force(z) - self.problem.still) / size - sign * self.nudge(z)",
        "return self.problem.force(z) / size - sign * self.nudge(z)",
        _NUDGES,
    ),
    Bug(
        _AEP + "aep.py",
        "_HEADROOM = 0.5",
        "_HEADROOM = 20.0",
        _EXACT,
        harmless="the phases are solved where the linear solution falls short: dear, but exact",
    ),
    Bug(
        _AEP + "aep.py",
        "replace(out, evaluations=looked + out.evaluations)",
        "replace(out, evaluations=out.evaluations)",
        _AEP + "test_counts.py",
    ),
    Bug(
        _AEP + "aep.py",
        "if linear.result and not out.result:",
        "if linear.result and not linear.result:",
        _EXACT,
    ),
    Bug(
        _AEP + "correction.py",
        "return forward - transposed\n\n    def measure",
        "return transposed - forward\n\n    def measure",
        _EXACT,
    ),
    Bug(
        _AEP + "aep.py",
        "correction.beside(first, cotangent - linear.force)",
        "correction.beside(first, cotangent + linear.force)",
        _EXACT,
    ),
    Bug(
        _AEP + "estimator.py",
        "size = scaled_norm(cotangent)",
        "size = sample_norm(cotangent)",
        _AEP + "test_scales.py",
    ),
    Bug(
        _AEP + "estimator.py",
        "undo = torch.where(usable, size, size - size)",
        "undo = torch.ones_like(size)",
        _EXACT,
    ),
    Bug(
        _AEP + "estimator.py",
        "value = free.value()",
        "value = free.state",
        "equilibrium/test_module.py",
    ),
    Bug(
        _AEP + "estimator.py",
        "scale=torch.ones_like(sample_norm(cotangent)),  # unit",
        "scale=None,  # unit",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "ep.py",
        "phases.run(1.0, -guess)",
        "phases.run(-1.0, -guess)",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "ep.py",
        'nudge_at("EP", self.nudge,',
        'nudge_at("EP", "linear",',
        _ADJOINTS,
    ),
    Bug(
        _AEP + "ep.py",
        "contrast(phases, plus, self.sides)",
        "contrast(phases, plus, 2)",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "problem.py",
        "return found.value + per_sample(stride, found.value) * found.force",
        "return found.value - per_sample(stride, found.value) * found.force",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "problem.py",
        "stride = stride.masked_fill((moved > allowed).any(1), 0.0)",
        "pass",
        _STIFF,
    ),
    Bug(
        _AEP + "problem.py",
        "stride = torch.where(stride > 0, step, stride)",
        "stride = torch.full_like(stride, step)",
        _STIFF,
    ),
    Bug(
        _AEP + "implicit.py",
        "tol, self.max_steps, self.solver)",
        "tol, self.max_steps, None)",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "one_step.py",
        "                term = term + problem.step * products.vjp(term)\n                total",
        "                term = term + problem.step * products.jvp(term)\n                total",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "dyadic.py",
        "pulled = problem.linearise(m).vjp(a) + nudge(m)",
        "pulled = problem.linearise().vjp(a) + nudge(m)",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "dyadic.py",
        "value=solution.value[:, 1]",
        "value=solution.value[:, 0]",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "holomorphic.py",
        "weight = (1 if real else 2) / self.points",
        "weight = 2 / self.points",
        _EXACT,
    ),
    Bug(
        _AEP + "holomorphic.py",
        "torch.complex(correction(u.real), across)",
        "torch.complex(correction(u.real), -across)",
        _EXACT,
    ),
    Bug(
        _AEP + "published.py",
        "drive = problem.force(z) - sign * beta * gradient(z)",
        "drive = problem.force(z) - sign * beta * gradient(still)",
        _PUBLISHED,
    ),
    Bug(
        _AEP + "published.py",
        "drive = drive - correct(z - still, drive)",
        "drive = drive - correct(z, drive)",
        _PUBLISHED,
    ),
    Bug(
        _AEP + "nudge.py",
        "return lambda z: cotangent + per_sample(scale, z) * (gradient(z) - at_rest)",
        "return lambda z: cotangent + (gradient(z) - at_rest)",
        _ADJOINTS,
    ),
    Bug(
        _AEP + "nudge.py",
        "return lambda z: cotangent + per_sample(scale, z) * (gradient(z) - at_rest)",
        "return lambda z: per_sample(scale, z) * gradient(z)",
        _NUDGES,
    ),
    Bug(
        _AEP + "nudge.py",
        "own = gradient(problem.given())",
        "own = gradient(problem.state)",
        _NUDGES,
    ),
    Bug(
        _AEP + "nudge.py",
        "wrong = off > _ROUNDED * wanted",
        "wrong = (off.norm() > _ROUNDED * wanted.norm()).expand_as(off)",
        _NUDGES,
    ),
    Bug(
        _AEP + "bptt.py",
        "solver.unroll(system.force, system.start(), step=system.step)",
        "solver.unroll(system.force, system.start().detach(), step=system.step)",
        _ADJOINTS,
    ),
]
