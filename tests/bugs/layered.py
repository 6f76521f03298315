"""Bugs of the layered systems that stacks become."""

from __future__ import annotations

from bugs.bug import Bug

_EQ = "equilibrium/"
_STACK = "equilibrium/dynamics/test_stack_blocks.py test_layered.py"

BUGS = [
    Bug(
        _EQ + "dynamics/habits.py",
        "for axis in (0, 1, None):",
        "for axis in (0, None):",
        _STACK,
    ),
    Bug(
        _EQ + "dynamics/conduct.py",
        "for some in (numbers[has], numbers[~has]):",
        "for some in (numbers[has],):",
        _EQ + "dynamics/test_interaction.py",
    ),
    Bug(
        _EQ + "dynamics/conduct.py",
        "return None if version == self.version else version",
        "return None",
        _STACK,
    ),
    Bug(
        _EQ + "dynamics/habits.py",
        "return rows.reshape(first).movedim(0, self.axis).contiguous()",
        "return rows.reshape(shape).contiguous()",
        _STACK,
    ),
    Bug(
        _EQ + "dynamics/layered.py",
        "return h if level in self._habits.pure else h.clone()",
        "return h",
        _STACK,
    ),
    Bug(
        _EQ + "dynamics/layered.py",
        "levels[level + 1] = levels[level + 1] + part.jvp(levels[level])",
        "levels[level + 1] = part.jvp(levels[level])",
        _EQ + "estimators/test_exact.py",
    ),
    Bug(
        _EQ + "dynamics/layered.py",
        "for level in reversed(range(len(self._parts))):",
        "for level in range(len(self._parts)):",
        _STACK,
    ),
    Bug(
        _EQ + "dynamics/layered.py",
        "with self._inside(), nullcontext() if draws is None else draws.again():",
        "with self._inside():",
        "test_convert_stack.py",
    ),
    Bug(
        "conversion/stack.py",
        "if not level.on or level.stack.busy",
        "if level.stack.busy",
        "test_convert_stack.py",
    ),
    Bug(
        "conversion/stack.py",
        "return assign_adjoint(out, value, refuse) if out.requires_grad else value",
        "return value",
        "test_convert_stack.py",
    ),
    Bug(
        _EQ + "dynamics/products.py",
        "library.enabled = False",
        "library.enabled = True",
        "equilibrium/dynamics/test_products.py",
    ),
]
