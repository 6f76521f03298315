"""Bugs of the estimators."""

from __future__ import annotations

from bugs.bug import Bug

_AEP = "equilibrium/estimators/"
_CONTRAST = "equilibrium/test_contrast.py equilibrium/test_warm_start.py"

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
        "hidden |= curved & (beside >= before / 2)",
        "hidden |= curved",
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
        "value=linear.value + problem.step * left,",
        "value=linear.value,",
        _CONTRAST + " equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "roundoff.py",
        "return norms / level_norms(a, widths).clamp_min(torch.finfo(norms.dtype).tiny)",
        "return norms",
        _CONTRAST,
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
        _AEP + "roundoff.py",
        "return torch.stack([sample_norm(part) for part in v.flatten(1).split(widths, 1)], 1)",
        "return sample_norm(v).unsqueeze(1).expand(-1, len(widths))",
        _CONTRAST,
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
        "equilibrium/test_warm_start.py",
    ),
    Bug(
        _AEP + "pair.py",
        "minus = phases.drive(-1.0, m + a) - (of_m + of_a)",
        "minus = phases.drive(-1.0, a) - of_a",
        "equilibrium/test_warm_start.py equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "phases.py",
        "beta = response * torch.where(state > 0, state, 1.0) / size.clamp_min(tiny)",
        "beta = response * state.clamp_min(tiny) / size.clamp_min(tiny)",
        "equilibrium/test_zero_state.py",
    ),
    Bug(
        _AEP + "phases.py",
        "value=(4 * near.value - far.value) / 3,",
        "value=(4 * near.value + far.value) / 5,",
        "equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "phases.py",
        "return replace(self, beta=self.beta / 2)",
        "return replace(self, beta=self.beta)",
        "equilibrium/test_exact_estimators.py equilibrium/test_nudges.py",
    ),
    Bug(
        _AEP + "phases.py",
        "return (self.problem.force(z) - self.problem.still) / size - sign * self.nudge(z)",
        "return self.problem.force(z) / size - sign * self.nudge(z)",
        "equilibrium/test_exact_estimators.py test_equilibrium_gradients.py",
    ),
    Bug(
        _AEP + "aep.py",
        "_HEADROOM = 0.5",
        "_HEADROOM = 20.0",
        "test_equilibrium_gradients.py",
        harmless="the phases are solved where the linear solution falls short: dear, but exact",
    ),
    Bug(
        _AEP + "aep.py",
        "if linear.result and not out.result:",
        "if linear.result and not linear.result:",
        "test_equilibrium_gradients.py",
    ),
    Bug(
        _AEP + "correction.py",
        "out = forward - transposed",
        "out = transposed - forward",
        "equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "correction.py",
        "return u is self._u and u._version == self._version",
        "return u.shape == self._u.shape",
        "equilibrium/test_exact_estimators.py equilibrium/test_warm_start.py",
    ),
    Bug(
        _AEP + "estimator.py",
        "undo = torch.where(usable, size, size - size)",
        "undo = torch.ones_like(size)",
        "test_equilibrium_gradients.py",
    ),
    Bug(
        _AEP + "estimator.py",
        "value = z + site.step * still",
        "value = z",
        "equilibrium/test_approach.py",
    ),
    Bug(
        _AEP + "estimator.py",
        "pulled = products.vjp(torch.cat([nothing, a], 1))",
        "pulled = products.jvp(torch.cat([nothing, a], 1))",
        "equilibrium/test_prefix.py",
    ),
    Bug(
        _AEP + "estimator.py",
        "scale=torch.ones_like(sample_norm(cotangent)),  # unit",
        "scale=None,  # unit",
        "equilibrium/test_estimator_facts.py equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "ep.py",
        "phases.run(1.0, -guess)",
        "phases.run(-1.0, -guess)",
        "equilibrium/test_estimator_facts.py test_equilibrium_gradients.py",
    ),
    Bug(
        _AEP + "ep.py",
        'nudge_at("EP", self.nudge,',
        'nudge_at("EP", "linear",',
        "equilibrium/test_estimator_facts.py",
    ),
    Bug(
        _AEP + "ep.py",
        "contrast(phases, plus, self.sides)",
        "contrast(phases, plus, 2)",
        "equilibrium/test_contrasts_and_own_solvers.py",
    ),
    Bug(
        _AEP + "implicit.py",
        "solution.value + stride * solution.force",
        "solution.value - stride * solution.force",
        "equilibrium/test_estimator_facts.py",
    ),
    Bug(
        _AEP + "implicit.py",
        "tol, self.max_steps, self.solver)",
        "tol, self.max_steps, None)",
        "equilibrium/test_contrasts_and_own_solvers.py",
    ),
    Bug(
        _AEP + "one_step.py",
        "                term = term + problem.step * products.vjp(term)\n                total",
        "                term = term + problem.step * products.jvp(term)\n                total",
        "equilibrium/test_estimator_facts.py",
    ),
    Bug(
        _AEP + "dyadic.py",
        "pulled = problem.linearise(m).vjp(a) + nudge(m)",
        "pulled = problem.linearise().vjp(a) + nudge(m)",
        "equilibrium/test_estimator_facts.py equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "dyadic.py",
        "value=solution.value[:, 1]",
        "value=solution.value[:, 0]",
        "equilibrium/test_estimator_facts.py",
    ),
    Bug(
        _AEP + "holomorphic.py",
        "weight = (1 if real else 2) / self.points",
        "weight = 2 / self.points",
        "equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "holomorphic.py",
        "torch.complex(correction(u.real), across)",
        "torch.complex(correction(u.real), -across)",
        "equilibrium/test_exact_estimators.py",
    ),
    Bug(
        _AEP + "published.py",
        "drive = problem.force(z) - sign * beta * gradient(z)",
        "drive = problem.force(z) - sign * beta * gradient(still)",
        "equilibrium/test_estimator_facts.py test_equilibrium_published.py",
    ),
    Bug(
        _AEP + "published.py",
        "drive = drive - correct(z - still, drive)",
        "drive = drive - correct(z, drive)",
        "equilibrium/test_estimator_facts.py test_equilibrium_published.py",
    ),
    Bug(
        _AEP + "nudge.py",
        "return lambda z: per_sample(scale, z) * gradient(z)",
        "return lambda z: gradient(z)",
        "equilibrium/test_nudges.py equilibrium/test_estimator_facts.py",
    ),
    Bug(
        _AEP + "bptt.py",
        "site.solver.unroll(site.force, site.start, step=site.step)",
        "site.solver.unroll(site.force, site.start.detach(), step=site.step)",
        "equilibrium/test_estimator_facts.py test_equilibrium_gradients.py",
    ),
]
