"""Bugs of the contracts in `altprop.testing`: a check that no longer checks."""

from __future__ import annotations

from bugs.bug import Bug

_RULES = "testing/test_rules_contract.py"
_HERE = "testing/test_equilibrium_contract.py::test_the_contract_of_"
_ESTIMATORS = _HERE + "estimators_catches"
_SOLVERS = _HERE + "solvers_catches"
_DYNAMICS = _HERE + "dynamics_catches"

BUGS = [
    Bug(
        "testing/contract.py",
        "require(error <= rtol * size,",
        "require(error <= size,",
        _ESTIMATORS,
    ),
    Bug(
        "testing/rules.py",
        'require(error <= tolerance * scale, f"{what}',
        'require(error <= scale, f"{what}',
        _RULES,
    ),
    Bug(
        "testing/rules.py",
        "    _check_forward(rule)\n    _check_gradients(rule)\n",
        "    _check_gradients(rule)\n",
        _RULES,
    ),
    Bug("testing/rules.py", "    check_samples(rule)\n", "    pass\n", _RULES),
    Bug("testing/rules.py", "    _check_twice(rule)\n", "", _RULES),
    Bug(
        "testing/rules.py",
        'error <= 0.15 * size + 1e-6, f"autocast: {told',
        'error <= 15 * size + 1e-6, f"autocast: {told',
        _RULES,
    ),
    Bug("testing/rules.py", "    _check_seeds(rule)\n", "", _RULES),
    Bug(
        "testing/rules.py",
        'module.__dict__.keys() == original.__dict__.keys(), "revert left',
        'module.__dict__.keys() >= original.__dict__.keys(), "revert left',
        _RULES,
    ),
    Bug("testing/rules.py", "    if compiled:\n        _check_compiled(rule)\n", "", _RULES),
    Bug(
        "testing/samples.py",
        "parts = [_gradients(model, x[n : n + 1], weights[n : n + 1]) for n in range(N)]",
        "parts = [_gradients(model, x, weights / N) for n in range(N)]",
        _RULES,
    ),
    Bug(
        "testing/samples.py",
        "error <= 1e-10 * max(1.0, size)",
        "error <= 1e10 * max(1.0, size)",
        _RULES + " test_layouts_measured.py",
    ),
    Bug(
        "testing/equilibrium.py",
        '    _same(got, wanted, rtol, f"on',
        '    _same(got, wanted, 1e3 * rtol, f"on',
        _ESTIMATORS,
    ),
    Bug("testing/equilibrium.py", "        _check_autograd(case)\n", "", _ESTIMATORS),
    Bug(
        "testing/equilibrium.py",
        "        _check_double_backward(case)\n",
        "",
        "test_exported_contracts.py::test_the_contract_of_estimators_catches_a_second_derivative",
    ),
    Bug("testing/solving.py", "    _check_independence(solver)\n", "", _SOLVERS),
    Bug("testing/solving.py", "    _check_limits(solver)\n", "", _SOLVERS),
    Bug("testing/solving.py", "    counted.check_start(where)\n", "", _SOLVERS),
    Bug(
        "testing/dynamics.py",
        "        for mode in (False, True):\n",
        "        for mode in (False,):\n",
        "equilibrium/dynamics/test_interaction.py",
    ),
    Bug(
        "testing/dynamics.py",
        'for name, argument in (("jvp", v), ("vjp", a)):',
        'for name, argument in (("jvp", v),):',
        _DYNAMICS,
    ),
]
