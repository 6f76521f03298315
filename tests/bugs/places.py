"""Bugs of what carries a rule: conversion, places, the error's way to its taps, gradients."""

from __future__ import annotations

from bugs.bug import Bug

_REFUSALS = "test_convert_refusals.py"
_AROUND = "test_convert_surroundings.py"
_BROADCAST = "rules/test_broadcast.py"
_LEARNED = "rules/test_learned_feedback.py"
_RECOMPUTED = "conversion/test_recomputed.py"
_LAYOUTS = "test_layouts.py test_layouts_measured.py"
_ATTENTION = "test_attention_arguments.py"

BUGS = [
    # layouts.py
    Bug(
        "layouts.py",
        "moved.insert(target, moved.pop(source))",
        "moved.insert(source, moved.pop(target))",
        _LAYOUTS,
    ),
    Bug(
        "layouts.py",
        "padded = have + (1,) * (len(want) - len(have))",
        "padded = (1,) * (len(want) - len(have)) + have",
        _LAYOUTS,
    ),
    Bug(
        "layouts.py",
        "view is None or (len(have) > 0 and view[a] != turned[a])",
        "view is None",
        _LAYOUTS,
    ),
    Bug("layouts.py", "else (axes, (0, batch_axis))", "else (axes,)", _LAYOUTS),
    Bug(
        "layouts.py",
        "tap if error_axis == tap_axis else tap.movedim(tap_axis, error_axis)",
        "tap if error_axis == tap_axis else tap.movedim(error_axis, tap_axis)",
        _LAYOUTS,
    ),
    # conversion/channel.py, conversion/passes.py
    Bug("conversion/channel.py", "self.known_layouts.clear()", "pass", "test_layouts_measured.py"),
    Bug(
        "conversion/passes.py",
        "key = index if B is not None else -count",
        "key = -count",
        _BROADCAST,
    ),
    Bug(
        "conversion/passes.py",
        "self.feedback.append(B[:count] if rows is None else B[rows])",
        "self.feedback.append(B[:count])",
        "test_layouts.py test_convert.py test_surgery.py",
    ),
    Bug(
        "conversion/passes.py",
        "if any(map(wants_gradient, weights)):",
        "if False:",
        "test_attention_arguments.py test_transformers.py",
    ),
    Bug(
        "conversion/passes.py",
        "        if not self.exact:\n",
        "        if True:\n",
        _BROADCAST,
    ),
    Bug(
        "conversion/passes.py",
        "self.channel.running = self.around",
        "self.channel.running = None",
        "test_convert.py",
    ),
    Bug("conversion/passes.py", "        self.waiting += 1\n", "", "test_convert.py"),
    Bug(
        "conversion/passes.py",
        "with keeping() if hooked() else contextlib.nullcontext():",
        "with contextlib.nullcontext():",
        _RECOMPUTED,
    ),
    Bug("conversion/sites.py", "exact=self.channel.exact)[0]", "exact=False)[0]", _RECOMPUTED),
    Bug("conversion/channel.py", "else known & told", "else known", "test_layouts_measured.py"),
    # conversion/replaced.py, conversion/outputs.py, conversion/unheard.py
    Bug(
        "conversion/replaced.py",
        'getattr(own, "__func__", None) is not type(module).forward',
        "False",
        "conversion/test_replaced_forwards.py",
    ),
    Bug(
        "conversion/replaced.py",
        'getattr(own, "__func__", None) is not type(module).forward',
        "True",
        "conversion/test_replaced_forwards.py",
    ),
    Bug(
        "conversion/outputs.py",
        "if leaves([self.node], self._ends) <= self.own:",
        "if True:",
        "conversion/test_outputs.py",
    ),
    Bug(
        "conversion/unheard.py",
        "id(w) in read and inside",
        "inside",
        "conversion/test_unheard.py",
    ),
    Bug(
        "conversion/unheard.py",
        "id(w) in read and inside.issuperset(holders.get(id(w), ()))",
        "id(w) in read",
        "conversion/test_unheard.py",
    ),
    # conversion/probes.py
    Bug(
        "conversion/probes.py",
        "held.update((name, _copied(own[name], copies)) for name in names)",
        "pass",
        "conversion/test_second_runs.py",
    ),
    Bug(
        "conversion/probes.py",
        "yield tree_map_only(Tensor, lambda t: _copied(t, copies), self.call[1:])",
        "yield self.call[1:]",
        "conversion/test_second_runs.py",
    ),
    Bug(
        "conversion/probes.py",
        "                place.on = True\n",
        "                pass\n",
        "rules/test_grape.py " + _BROADCAST,
    ),
    Bug(
        "conversion/probes.py",
        "                module.training = True\n",
        "                pass\n",
        "rules/test_grape.py " + _BROADCAST,
    ),
    Bug(
        "conversion/probes.py",
        "            channel.running = None\n",
        "            pass\n",
        "test_layouts_measured.py",
    ),
    Bug(
        "conversion/probes.py",
        "with torch.random.fork_rng(devices), ",
        "with ",
        "test_layouts_measured.py",
    ),
    Bug(
        "conversion/probes.py",
        "if along.nonzero().flatten().tolist() != [i]:",
        "if i not in along.nonzero().flatten().tolist():",
        _LAYOUTS,
    ),
    # conversion/sites.py
    Bug(
        "conversion/record.py",
        "            )\n        return int(step) - 1\n",
        "            )\n        return int(step)\n",
        "test_surgery.py test_rules_broadcast.py test_rules.py",
    ),
    Bug(
        "conversion/sites.py", "return B.detach() if wants_gradient(B) else B", "return B", _LEARNED
    ),
    Bug(
        "assign.py",
        "(0, 0, rows.start, ctx.shape[0] - rows.stop)",
        "(0, 0, ctx.shape[0] - rows.stop, rows.start)",
        _ATTENTION + " test_convert.py test_surgery.py",
    ),
    Bug(
        "conversion/passes.py",
        "return hidden if self.exact else hidden.detach()",
        "return hidden",
        _BROADCAST,
    ),
    Bug("conversion/roles.py", "step % period == period - 1", "step % period == 0", _BROADCAST),
    Bug(
        "conversion/sites.py",
        "return y.transpose(0, 1) if self.swapped else y",
        "return y",
        _LAYOUTS,
    ),
    Bug(
        "conversion/sites.py",
        "W.t() if self.transposed and W is not None else W",
        "W",
        "test_convert_layers.py test_transformers.py",
    ),
    # conversion/convert.py, changes.py, places.py, layers.py and learned.py
    Bug("conversion/convert.py", "            module.__class__ = kind\n", "", _REFUSALS),
    Bug(
        "conversion/changes.py",
        "nn.Parameter(B, requires_grad=not frozen)",
        "nn.Parameter(B)",
        _LEARNED,
    ),
    Bug(
        "conversion/changes.py",
        "generator_for(self.seed, place.path))\n        if B is None:",
        "generator_for(0, place.path))\n        if B is None:",
        "test_convert.py test_rules.py",
    ),
    Bug("conversion/changes.py", "layouts = allowed_layouts(layouts[0][1])", "pass", _LAYOUTS),
    Bug(
        "conversion/changes.py",
        'place.path, "tap")',
        '"tap")',
        _BROADCAST + " test_convert.py",
    ),
    Bug(
        "conversion/sites.py",
        "        self.channel.forget(self)\n",
        "        pass\n",
        "test_revert.py",
    ),
    Bug(
        "conversion/layers.py",
        "    return torch.allclose(got, want, rtol=1e-2, atol=1e-2)\n",
        "    return True\n",
        "test_convert_layers.py",
    ),
    Bug(
        "conversion/places.py",
        'p.path.startswith(path + ".")',
        "p.path.startswith(path)",
        "test_convert.py test_rules_broadcast.py",
    ),
    Bug(
        "conversion/places.py",
        "for n in range(len(parts), 0, -1))",
        "for n in range(len(parts), 1, -1))",
        "test_convert.py",
    ),
    Bug(
        "conversion/planner.py",
        "for pattern, rule in self.earlier if kind in rule.takes]",
        "for pattern, rule in self.earlier]",
        "test_convert.py test_rules_broadcast.py",
    ),
    Bug(
        "conversion/planner.py",
        "if id(place.module) in within:",
        "if False:",
        "test_convert_stack.py",
    ),
    Bug(
        "conversion/learned.py",
        "key=lambda p: (not p.requires_grad, p.dim() < 2)",
        "key=lambda p: not p.requires_grad",
        _LEARNED,
    ),
    Bug(
        "conversion/learned.py",
        "if any(w.requires_grad for w in found[2])",
        "if True",
        _LEARNED,
    ),
    Bug(
        "conversion/places.py",
        "if any(weight.is_meta for weight in weights):",
        "if False:",
        _REFUSALS,
    ),
    # assign.py, transforms.py
    Bug(
        "assign.py",
        "a = applied(OnceOnly, a, cotangent, force)",
        "pass",
        "equilibrium/test_module.py",
    ),
    Bug(
        "assign.py",
        "            to_W = flat.t().mm(_matrix(x))\n",
        "            to_W = (flat / len(flat)).t().mm(_matrix(x))\n",
        "rules/test_transport.py",
    ),
    Bug(
        "assign.py",
        "follows = B is not None and wants_gradient(B)",
        "follows = False",
        _LEARNED,
    ),
    Bug("assign.py", "signal = g if ctx.exact else tap", "signal = tap", _BROADCAST),
    Bug(
        "assign.py",
        "            return (e, *once_only(grads[1:], e, *saved))\n",
        "            return grads\n",
        "test_rules_broadcast.py",
    ),
    Bug(
        "assign.py",
        "x, W, b, B = _autocast(x, W, b, B)",
        "x, W, b, _ = _autocast(x, W, b, B)",
        "test_convert.py testing/test_rules_contract.py",
    ),
    Bug(
        "assign.py",
        "if follows or wants_gradient(x) else (None, None, None)",
        "if True else (None, None, None)",
        "rules/test_transport.py",
    ),
    Bug(
        "transforms.py",
        "t.requires_grad or (transforming() and _wraps_gradient(t))",
        "t.requires_grad",
        "test_transforms.py",
    ),
    # conversion/attention.py, linear.py
    Bug(
        "conversion/attention.py",
        "any(map(wants_gradient, (*inputs, *module.parameters())))",
        "any(t.requires_grad for t in (*inputs, *module.parameters()))",
        "test_transforms.py",
    ),
    Bug(
        "conversion/record.py",
        "key=Tensor.numel, reverse=True",
        "key=Tensor.numel",
        "rules/test_computed_weights.py",
    ),
    Bug("linear.py", "self._again = self._input is not None", "pass", "test_linear.py"),
    Bug("conversion/attention.py", "mask + padding", "mask", _ATTENTION),
    Bug(
        "conversion/attention.py",
        "q * math.sqrt(1.0 / float(D))",
        "q * math.sqrt(1.0 / float(H * D))",
        _ATTENTION,
    ),
    Bug(
        "conversion/attention.py",
        "dropout = m.dropout if m.training else 0.0",
        "dropout = m.dropout",
        _ATTENTION,
    ),
    Bug("conversion/attention.py", "None if b is None else b[rows], rows)", "b, rows)", _ATTENTION),
    Bug(
        "conversion/attention.py",
        "return any(isinstance(m, nn.MultiheadAttention) and m.batch_first for m",
        "return any(isinstance(m, nn.MultiheadAttention) for m",
        _LAYOUTS,
    ),
    Bug("linear.py", "signal = signal / len(signal)", "signal = signal / len(x)", "test_linear.py"),
    Bug("linear.py", "x, self._input = self._input, None", "x = self._input", "test_linear.py"),
    Bug(
        "linear.py",
        "self.B.sub_(cosine_gradient(self.B, estimate), alpha=lr_b)",
        "self.B.add_(cosine_gradient(self.B, estimate), alpha=lr_b)",
        "test_linear.py",
    ),
    # conversion/explain.py
    Bug(
        "conversion/explain.py",
        "signals = {text for at, text in self.senders if index < at <= cut}",
        "signals = {text for at, text in self.senders if index <= at <= cut}",
        "test_explain.py",
    ),
    Bug(
        "conversion/explain.py",
        "transports=old.transports or new.transports",
        "transports=new.transports",
        "test_explain.py",
    ),
]
