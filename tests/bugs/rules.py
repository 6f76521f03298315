"""Bugs of the rules and of the feedback that they draw."""

from __future__ import annotations

from bugs.bug import Bug

_FORMULAS = "rules/test_transport.py"
_DRAWS = "rules/test_draws.py"
_BROADCAST = "rules/test_broadcast.py"
_GRAPE = "rules/test_grape.py"

BUGS = [
    Bug("feedback.py", "(seed, *place)))", "(seed, *place[-1:])))", _FORMULAS + " " + _BROADCAST),
    Bug("feedback.py", "(seed, *place)))", "(0, *place)))", _FORMULAS + " " + _BROADCAST),
    Bug(
        "feedback.py",
        "q[:, r.diagonal() < 0] *= -1",
        "q[r.diagonal() < 0] *= 1",
        _FORMULAS,
    ),
    Bug("feedback.py", "(math.sqrt(columns) * std)", "(math.sqrt(rows) * std)", _DRAWS),
    Bug(
        "feedback.py",
        "math.sqrt(columns / max(count, 1))",
        "math.sqrt(rows / max(count, 1))",
        _DRAWS,
    ),
    Bug("feedback.py", "B.shape[dim] ** 0.5", "B.shape[1 - dim] ** 0.5", _FORMULAS),
    Bug(
        "feedback.py",
        "cos * B / b.square() - target / (b * t)",
        "cos * B / b - target / (b * t)",
        _FORMULAS + " " + _GRAPE,
    ),
    Bug(
        "feedback.py",
        'shape, generator=generator, dtype=torch.float32, device="cpu")',
        'shape, generator=generator, device="cpu")',
        "test_convert_surroundings.py",
    ),
    Bug(
        "rule.py",
        "B.t().to(e.dtype)).expand(shape)",
        "B.t().to(e.dtype)).expand(shape) * 1.001",
        _BROADCAST,
    ),
    Bug(
        "rules/aligned.py",
        "normalised(B, self.std, 0)",
        "normalised(B, self.std, 1)",
        _FORMULAS,
    ),
    Bug(
        "rules/aligned.py",
        "return cosine_gradient(B, (p @ W.t()).t() @ p / len(p))",
        "return cosine_gradient(B, W)",
        _FORMULAS,
    ),
    Bug(
        "rules/backprop.py",
        'return frozenset({"maps", "blocks"})',
        'return frozenset({"maps"})',
        "test_convert.py test_rules_broadcast.py",
    ),
    Bug(
        "rules/block_direct.py",
        "scope.tap(scope.maps_in(block), at=block)",
        "scope.tap(scope.maps_in(block))",
        _BROADCAST,
    ),
    Bug(
        "rules/direct.py",
        'return self.pass_through == "hybrid"',
        "return True",
        _BROADCAST,
    ),
    Bug("rules/direct.py", 'return self.error == "head_input"', "return False", _BROADCAST),
    Bug("rules/direct.py", 'pass_through: str = "hybrid"', 'pass_through: str = "pure"', _DRAWS),
    Bug("rules/feedback_alignment.py", "        return B\n", "        return W\n", _FORMULAS),
    Bug("rules/feedback_alignment.py", "std=self.std, k=self.k)", "k=self.k)", _DRAWS),
    Bug("rules/grape.py", '"probe", step)', '"probe")', _GRAPE + " " + _BROADCAST),
    Bug(
        "rules/grape.py",
        "total = pairs if total is None else total + pairs",
        "total = pairs",
        _GRAPE + " " + _BROADCAST,
    ),
    Bug(
        "rules/grape.py",
        "probe.average(total / self.probes)",
        "total / self.probes",
        "test_rules.py::test_every_rule_gives_the_joint_gradient_in_two_processes",
    ),
    Bug(
        "rules/grape.py",
        '{"hidden": 1, "output": 0, "none": 1}',
        '{"hidden": 0, "output": 1, "none": 1}',
        _GRAPE + " " + _BROADCAST,
    ),
    Bug("rules/grape.py", "if step % self.every:", "if False:", _GRAPE + " " + _BROADCAST),
    Bug("rules/kolen_pollack.py", "grad_W.clone()", "-grad_W.clone()", _FORMULAS),
    Bug("rules/sign_symmetry.py", "max(W.numel(), 1)", "max(W.shape[1], 1)", _FORMULAS),
    Bug("rules/sign_symmetry.py", "2 / max(W.shape[1], 1)", "2 / max(W.shape[0], 1)", _FORMULAS),
    Bug(
        "rules/weight_mirror.py",
        "return p - p.mean(0)",
        "return p - p.mean(1, keepdim=True)",
        _FORMULAS,
    ),
    Bug("rules/weight_mirror.py", "alpha=-1 / len(p)", "alpha=1 / len(p)", _FORMULAS),
    Bug("rules/weight_mirror.py", "beta=self.decay", "beta=1", _FORMULAS),
]
