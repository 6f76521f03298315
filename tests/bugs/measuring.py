"""Bugs of what measures: audits, agreements, reports, memory."""

from __future__ import annotations

from bugs.bug import Bug

_FACTS = "test_audit_facts.py"
_AUDIT = "test_audit_facts.py test_audit.py"
_AGREEMENT = "auditing/test_agreement.py"
_TABLES = "test_audit_tables.py"
_LAB = "lab/"

BUGS = [
    Bug(
        "auditing/agreement.py",
        "norm_ratio=own / size",
        "norm_ratio=size / own if own else 0.0",
        _AGREEMENT,
    ),
    Bug(
        "auditing/agreement.py",
        "relative_error=float((g - r).norm()) / size",
        "relative_error=float((g - r).norm()) / (own or 1.0)",
        _AGREEMENT,
    ),
    Bug("auditing/agreement.py", "pointed = r != 0", "pointed = g != 0", _AGREEMENT),
    Bug(
        "auditing/agreement.py",
        "[gradients[name] for name in references]",
        "[gradients[name] for name in gradients]",
        _AGREEMENT,
    ),
    Bug(
        "auditing/agreement.py",
        "t.double().flatten() for t in real",
        "t.flatten() for t in real",
        _AGREEMENT,
    ),
    Bug(
        "auditing/agreement.py",
        "return abs(math.log(value)) if value > 0 else math.inf",
        "return abs(value - 1)",
        _AGREEMENT,
    ),
    Bug("auditing/arms.py", "output=self.output, seed=self.seed)", "output=self.output)", _FACTS),
    Bug(
        "auditing/arms.py",
        "return rules_off(model) if self.exact else nullcontext()",
        "return nullcontext()",
        "test_audit_gpt.py",
    ),
    Bug(
        "auditing/measure.py",
        "if p.requires_grad and id(p) not in feedback}",
        "if p.requires_grad}",
        _FACTS,
    ),
    Bug("auditing/arms.py", "            revert(model)\n", "            pass\n", _FACTS),
    Bug(
        "auditing/audit.py",
        "                restore()\n                gradients, measured",
        "                gradients, measured",
        _AUDIT,
    ),
    Bug(
        "auditing/audit.py",
        "compare_all(gradients, references, floor), measured",
        "compare_all(gradients, references), measured",
        _AUDIT,
    ),
    Bug(
        "auditing/measure.py",
        "slopes.append((8 * near - far) / (12 * h))",
        "slopes.append((8 * near + far) / (12 * h))",
        _AUDIT,
    ),
    Bug("auditing/measure.py", "        torch.set_rng_state(host)\n", "        pass\n", _AUDIT),
    Bug(
        "auditing/rows.py",
        '"adjoint": max(known("adjoint_residual"), default=None)',
        '"adjoint": max(known("nudged_residual"), default=None)',
        _FACTS,
    ),
    Bug(
        "auditing/tables.py",
        "math.trunc(value * 10**digits) / 10**digits",
        "round(value, digits)",
        _TABLES,
    ),
    Bug(
        "auditing/tables.py",
        "min(known, key=lambda n: known[n])",
        "max(known, key=lambda n: known[n])",
        _TABLES,
    ),
    Bug("auditing/tables.py", 'cost["peak_bytes"] / 2**20', 'cost["peak_bytes"] / 1e6', _TABLES),
    Bug(
        "auditing/memory.py",
        "self.peak = max(self.peak, self._now)",
        "self.peak = self._now",
        "test_memory.py",
    ),
    Bug(
        "auditing/memory.py",
        "self._meet(tensor, counts=False)",
        "self._meet(tensor, counts=True)",
        "test_memory.py",
    ),
    Bug(
        "auditing/memory.py",
        "            self._now -= size\n",
        "            pass\n",
        "test_memory.py",
    ),
    Bug(
        _LAB + "reporting/metrics.py", "before = [0, *counts]", "before = counts", "test_report.py"
    ),
    Bug(
        _LAB + "audit_gpt.py",
        "(controls['frozen'] - loss) / gap",
        "(controls['frozen'] - loss) / controls['frozen']",
        "test_audit_gpt.py",
    ),
    Bug(
        _LAB + "audit_gpt.py",
        "if state.progress.step in places:",
        "if state.progress.step == 0:",
        "test_audit_command.py",
    ),
    Bug(
        _LAB + "reporting/markup.py",
        "parts = (part if isinstance(part, Markup) else html.escape(str(part)) for part in inside)",
        "parts = (str(part) for part in inside)",
        "test_report_command.py",
    ),
    Bug(
        _LAB + "reporting/markup.py",
        'for mark in "<>&":',
        'for mark in ">&":',
        "test_report_command.py",
    ),
    Bug(
        _LAB + "reporting/thin.py",
        "kept = range((count - 1) % every, count, every)",
        "kept = range(0, count, every)",
        "test_report_command.py",
    ),
    Bug(
        _LAB + "reporting/thin.py",
        "return sum(there) / len(there) if len(there) == len(values) else None",
        "return sum(there) / len(there)",
        "test_report_command.py",
    ),
    Bug(
        _LAB + "reporting/comparison.py",
        'sign = 1 if self.results["task"]["better"] == "lower" else -1',
        "sign = -1",
        "test_report_command.py",
    ),
    Bug(
        _LAB + "reporting/comparison_page.py",
        "return 0 if low <= 0 <= high else",
        "return",
        "test_report_command.py",
    ),
    Bug(
        _LAB + "reporting/picture.py",
        'return text.replace("$", r"\\$")',
        "return text",
        "test_report_command.py",
    ),
]
