"""Bugs of equilibria: dynamics, their closed forms, calls, spectra, stability."""

from __future__ import annotations

from bugs.bug import Bug

_EQ = "equilibrium/"
_HINGE = _EQ + "test_hinge.py"
_NOISE = _EQ + "dynamics/test_noise.py"
_APART = _EQ + "dynamics/test_interaction.py"
_PRODUCTS = _EQ + "dynamics/test_products.py"
_CLOSURES = _EQ + "dynamics/test_closures.py"
_MODULE = _EQ + "test_module.py"
_BETWEEN = _EQ + "test_between.py"
_DYNAMICS = _EQ + "dynamics/test_dynamics.py"

BUGS = [
    Bug(
        _EQ + "dynamics/plain.py",
        "return is_overridden(root, FORCE) or is_hooked(root)",
        "return is_overridden(root, FORCE)",
        _EQ + "dynamics/test_record.py",
    ),
    Bug(
        _EQ + "dynamics/plain.py",
        "return is_overridden(root, FORCE) or is_hooked(root)",
        "return is_hooked(root)",
        _EQ + "dynamics/test_record.py",
    ),
    Bug(
        _EQ + "dynamics/plain.py",
        'len(vars(m).get("normalized_shape", "1")) == 1',
        'len(vars(m).get("normalized_shape", "1")) >= 1',
        _EQ + "dynamics/test_record.py",
    ),
    Bug(_EQ + "dynamics/dynamics.py", "        self._draws = draws\n", "        pass\n", _NOISE),
    Bug(
        _EQ + "dynamics/dynamics.py",
        "Driven(self._dynamics, self.x.detach(), args, kwargs)",
        "Driven(self._dynamics, self.x.detach())",
        _EQ + "test_system_of_a_call.py",
    ),
    Bug(
        _EQ + "dynamics/dynamics.py",
        "self.once().force",
        "self.force",
        _NOISE,
    ),
    Bug(_EQ + "dynamics/conduct.py", "            b.copy_(copy)\n", "            pass\n", _APART),
    Bug(
        _EQ + "dynamics/conduct.py",
        "            self._stand(before)\n",
        "            pass\n",
        _NOISE + " test_layered.py",
    ),
    Bug(
        _EQ + "dynamics/conduct.py",
        "return self.calls & (self.calls + 1) == 0 or",
        "return self.calls == 0 or",
        _APART,
    ),
    Bug(
        _EQ + "module.py",
        "value = found.value()\n",
        "value = found.state\n",
        "lm/test_generation.py",
    ),
    Bug(
        _EQ + "call.py",
        '    if result or policy == "accept":\n',
        '    if result or policy != "raise":\n',
        _MODULE,
    ),
    Bug(
        _EQ + "estimators/problem.py",
        "own = with_limits(solver or self.solver, tol, max_steps)",
        "own = with_limits(self.solver, tol, max_steps)",
        _EQ + "estimators/test_adjoints.py",
    ),
    Bug(
        _EQ + "estimators/problem.py",
        "return self._linearised() if at is None else self._system.linearise(at)",
        "return self._linearised()",
        _EQ + "estimators/test_adjoints.py",
    ),
    Bug(
        _EQ + "module.py",
        '{**super().__getstate__(), "certificate": None}',
        "super().__getstate__()",
        _MODULE,
    ),
    Bug(
        _EQ + "dynamics/damped.py",
        "self.step = 1 / (1 + scale * damping)",
        "self.step = 1 / (1 + damping)",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/attention.py",
        "device=z.device).triu_(S + 1)",
        "device=z.device).triu_(S)",
        _DYNAMICS + " lm/test_generation.py",
    ),
    Bug(
        _EQ + "dynamics/gated.py",
        "to_x = du + (1 - self._alpha) * dw",
        "to_x = du + dw",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/gated.py",
        "return self._alpha * self._block.vjp(a)[1] - a",
        "return self._block.vjp(self._alpha * a)[1] - a",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/gated_stack.py",
        "return self._first.own_vjp(carried) + carried - a",
        "return self._first.own_vjp(carried) + a - a",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/gated_stack.py",
        "grown.append(block.remember(h, own))",
        "grown.append(block.remember(h, None))",
        "lm/test_generation.py",
    ),
    Bug(
        _EQ + "dynamics/damped.py",
        "pulled = a if self._scale == 1 else self._scale * a",
        "pulled = a",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/linearised.py",
        "yield 1, ds.mT @ self._q",
        "yield 1, ds @ self._q",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/linearised.py",
        "future = torch.ones(j - i, j, dtype=torch.bool, device=q.device).triu_(i + 1)",
        "future = torch.ones(j - i, j, dtype=torch.bool, device=q.device).triu_(1)",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/linearised.py",
        "return self._project(a * self._weight)",
        "return self._project(a) * self._weight",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/linearised.py",
        "gradients[slot] = weight if weight is None else weight.mul_(self._roots[slot])",
        "gradients[slot] = weight",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/closures.py",
        "            known[code.co_varnames[0]] = owner, first\n",
        "            pass\n",
        _CLOSURES,
    ),
    Bug(
        _EQ + "dynamics/closures.py",
        "                yield from self.code(made, handed, around)\n",
        "                yield from self.code(made, {}, around)\n",
        _CLOSURES,
    ),
    Bug(
        _EQ + "dynamics/closures.py",
        '"LOAD_ATTR", "LOAD_METHOD"):\n            now[2].append(given)\n',
        '"LOAD_ATTR", "LOAD_METHOD"):\n',
        _CLOSURES,
    ),
    Bug(
        _EQ + "dynamics/products.py",
        'raise RuntimeError("what it computes from its cotangent is not recorded")',
        "pass",
        _PRODUCTS,
    ),
    Bug(_EQ + "dynamics/products.py", "                turned.pull()\n", "", _PRODUCTS),
    Bug(
        _EQ + "call.py",
        "            with draws.again():\n                return cost(read(z))\n",
        "            return cost(read(z))\n",
        _NOISE,
    ),
    Bug(
        _EQ + "module.py",
        "args, kwargs = _widened((args, kwargs))",
        "pass",
        _MODULE,
    ),
    Bug(
        _EQ + "dynamics/products.py",
        "        if kept is None:  # hooks on saved tensors gave a copy\n"
        "            kept = again()\n",
        "",
        _EQ + "dynamics/test_record.py",
    ),
    Bug(
        _EQ + "spectra.py",
        "return (products.jvp(v) + products.vjp(v)) / 2",
        "return products.jvp(v)",
        _EQ + "test_spectra.py",
    ),
    Bug(
        _EQ + "spectra.py",
        "columns.squeeze(2).permute(1, 2, 0)",
        "columns.squeeze(2).permute(1, 0, 2)",
        _EQ + "test_spectra.py",
    ),
    Bug(
        _EQ + "spectra.py", "        cache = extension.remember(own)\n", "", _EQ + "test_spectra.py"
    ),
    Bug(
        _EQ + "hinge.py",
        "2 * self.weight * self.every * (measured - margin)",
        "2 * self.weight * (measured - margin)",
        _HINGE,
    ),
    Bug(
        _EQ + "hinge.py",
        "state.keep(name, blocks.unit(pulled) + self.fresh * noise)",
        "state.keep(name, v + self.fresh * noise)",
        _HINGE,
    ),
    Bug(
        _EQ + "hinge.py",
        "blocks.unit(v + blocks.unit(remainder))",
        "blocks.unit(v + remainder)",
        _HINGE,
    ),
    Bug(
        _EQ + "hinge.py",
        '{"batch": 0, "sample": 1, "token": 2}[kind]',
        '{"batch": 0, "sample": 0, "token": 2}[kind]',
        _HINGE,
    ),
    Bug(
        _EQ + "hinge.py",
        "slope * blocks.unit(pulled), v * (slope > 0)",
        "slope * v, v * (slope > 0)",
        _HINGE,
    ),
    Bug(
        _EQ + "hinge.py",
        "per_sample(system.step * size / (2 * h), z) * v",
        "per_sample(size / (2 * h), z) * v",
        _HINGE,
    ),
    Bug(
        _EQ + "hinge.py",
        "h = torch.finfo(z.dtype).eps ** (1 / 3) * moved",
        "h = torch.finfo(z.dtype).eps ** (1 / 3) * sample_norm(z)",
        _EQ + "test_push.py",
    ),
    Bug(
        _EQ + "hinge.py",
        "z, system = seen.state, seen.system.once()",
        "z, system = seen.state, seen.system",
        _EQ + "test_push.py",
    ),
    Bug(
        _EQ + "gate_hinge.py",
        "z, system = seen.state, seen.system.once()",
        "z, system = seen.state, seen.system",
        _EQ + "test_push.py",
    ),
    Bug(
        _EQ + "hinge.py",
        "slope * blocks.unit(pulled), v * (slope > 0)",
        "slope * blocks.unit(pulled), v",
        _HINGE,
    ),
    Bug(
        _EQ + "dynamics/linearised.py",
        "yield 1, own * (da * (v - self.value)).sum(-1, keepdim=True) * q",
        "yield 1, own * (da * v).sum(-1, keepdim=True) * q",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "dynamics/linearised.py",
        "yield 1, ds.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * self._q",
        "yield 1, self._p.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * self._q",
        _DYNAMICS,
    ),
    Bug(
        _EQ + "gate_hinge.py",
        "system.force(z + system.step * force)",
        "system.force(z + force)",
        _EQ + "test_gate_hinge.py",
    ),
    Bug(
        _EQ + "gate_hinge.py",
        "(ratio - target).clamp_min(0) * ratio",
        "(ratio - target).clamp_min(0)",
        _EQ + "test_gate_hinge.py",
    ),
    Bug(
        _EQ + "exact.py",
        "residual = found.residual / (1 + sample_norm(found.value))",
        "residual = found.residual",
        "rules/test_rules_off.py",
    ),
    Bug(
        _EQ + "dynamics/analytic.py",
        "tail = erfc_right(torch.where(left, -z, z)) / 2",
        "tail = erfc_right(z) / 2",
        _EQ + "dynamics/test_analytic.py",
    ),
    Bug(
        _EQ + "dynamics/analytic.py",
        "scores = q @ k.transpose(-1, -2) * (C // heads) ** -0.5",
        "scores = q @ k.mH * (C // heads) ** -0.5",
        _EQ + "dynamics/test_analytic.py",
    ),
    Bug(
        _EQ + "dynamics/conduct.py",
        "            with unnoticed():\n                seen",
        "            if True:\n                seen",
        _MODULE,
    ),
    Bug(_EQ + "call.py", "if version_of(p) != version:", "if False:", _BETWEEN),
    Bug(
        _EQ + "dynamics/surroundings.py",
        "            m.training = then\n",
        "            pass\n",
        _BETWEEN,
    ),
    Bug(_EQ + "dynamics/surroundings.py", "place()[one.name] = one.tensor", "place()", _BETWEEN),
    Bug(
        _EQ + "dynamics/surroundings.py",
        "for one in self._held if not (one.moved() or one.changed())]",
        "for one in self._held]",
        _BETWEEN,
    ),
    Bug(_EQ + "dynamics/surroundings.py", "and not (one.buffer and parallel)", "", _BETWEEN),
    Bug(
        _EQ + "dynamics/surroundings.py",
        "for name, written in self._given if written.changed()]",
        "for name, written in ()]",
        _BETWEEN,
    ),
    Bug(
        _EQ + "dynamics/surroundings.py",
        "kept._modes, kept._given = self._modes, self._given",
        "pass",
        _BETWEEN,
    ),
    Bug(_EQ + "dynamics/dynamics.py", "        self._around.leave()\n", "", _BETWEEN),
]
