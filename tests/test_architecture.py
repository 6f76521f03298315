"""The seams stay where they are: what imports what, how long files are, what is exported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

import altprop

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# The first pattern that fits a module says what of altprop it may import. `.*` is one level or
# more. What is not listed under a concrete rule, estimator or solver it receives as an argument.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "altprop": ("altprop.*", "!altprop.lm.*", "!altprop.lab.*", "!altprop.testing.*"),
    "altprop.__main__": ("altprop.lab.cli",),
    "altprop.errors": (),
    "altprop.terminal": (),
    "altprop.reading": ("altprop.errors",),
    "altprop.auditing.memory": (),
    "altprop.recording": (),
    "altprop.drawing": (),
    "altprop.transforms": ("altprop.errors",),
    "altprop.layouts": ("altprop.errors",),
    "altprop.once": ("altprop.transforms",),
    "altprop.assign": ("altprop.errors", "altprop.once", "altprop.transforms"),
    "altprop.rule": ("altprop.errors", "altprop.assign", "altprop.layouts"),
    "altprop.feedback": ("altprop.errors",),
    "altprop.parts": (),
    "altprop.rules.*": ("altprop.errors", "altprop.assign", "altprop.feedback", "altprop.rule"),
    "altprop.equilibrium.solvers.solver": ("altprop.errors",),
    "altprop.equilibrium.solvers.fallback": ("altprop.errors", "altprop.equilibrium.solvers.*"),
    "altprop.equilibrium.solvers.scattered": ("altprop.errors", "altprop.equilibrium.solvers.*"),
    "altprop.equilibrium.solvers.*": (
        "altprop.errors",
        "altprop.equilibrium.solvers.solver",
        "altprop.equilibrium.solvers.krylov",
        "altprop.equilibrium.solvers.relaxation",
    ),
    "altprop.equilibrium.estimators.problem": (
        "altprop.equilibrium.dynamics.products",
        "altprop.equilibrium.dynamics.system",
        "altprop.equilibrium.levels",
        "altprop.equilibrium.solvers.defect",
        "altprop.equilibrium.solvers.solver",
    ),
    "altprop.equilibrium.estimators.estimator": (
        "altprop.errors",
        "altprop.assign",
        "altprop.rule",
        "altprop.transforms",
        "altprop.equilibrium.call",
        "altprop.equilibrium.dynamics.products",
        "altprop.equilibrium.solvers.solver",
        "altprop.equilibrium.estimators.problem",
    ),
    "altprop.equilibrium.estimators.*": (
        "altprop.errors",
        "altprop.equilibrium.call",
        "altprop.equilibrium.dynamics.products",
        "altprop.equilibrium.estimators.problem",
        "altprop.assign",
        "altprop.rule",
        "altprop.equilibrium.levels",
        "altprop.equilibrium.solvers.solver",
        "altprop.equilibrium.estimators.estimator",
        "altprop.equilibrium.estimators.phases",
        "altprop.equilibrium.estimators.pair",
        "altprop.equilibrium.estimators.confirm",
        "altprop.equilibrium.estimators.roundoff",
        "altprop.equilibrium.estimators.correction",
        "altprop.equilibrium.estimators.nudge",
    ),
    "altprop.equilibrium.*": (
        "altprop.errors",
        "altprop.transforms",
        "altprop.assign",
        "altprop.parts",
        "altprop.recording",
        "altprop.rule",
        "altprop.equilibrium.*",
    ),
    "altprop.testing": ("altprop.testing.*",),
    "altprop.testing.*": ("altprop", "altprop.*", "!altprop.lm.*", "!altprop.lab.*"),
    "altprop.lm": ("altprop.lm.*",),
    "altprop.lm.*": (
        "altprop",
        "altprop.errors",
        "altprop.files",
        "altprop.parts",
        "altprop.reading",
        "altprop.terminal",
        "altprop.lm.*",
    ),
    "altprop.lab": ("altprop.lab.*",),
    # what an audit counts and how sure a mean is, which a comparison says in the same way
    "altprop.lab.compare.cost": ("altprop", "altprop.auditing.memory", "altprop.lab.*"),
    "altprop.lab.compare.statistics": ("altprop.statistics",),
    "altprop.lab.compare": ("altprop.lab.compare.*",),
    "altprop.lab.tasks": ("altprop.lab.tasks.*",),
    "altprop.lab.*": (
        "altprop",
        "altprop.drawing",
        "altprop.errors",
        "altprop.files",
        "altprop.statistics",
        "altprop.reading",
        "altprop.shape",
        "altprop.terminal",
        "altprop.lm.*",
        "altprop.lab.*",
    ),
    "altprop.*": ("altprop.*", "!altprop.lm.*", "!altprop.lab.*", "!altprop.testing.*"),
}


def sources() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted((SRC / "altprop").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


def imported(module: str, source: str) -> Iterator[str]:
    """Yield every module of altprop that `source` imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: {ast.unparse(node)}"
            base = node.module or ""
            # `from package import module` imports that module, not only the package
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "altprop")


def forbidden(module: str, source: str) -> list[str]:
    """Return what `module` imports and must not."""
    allowed = next(may for pattern, may in MAY_IMPORT.items() if fnmatch(module, pattern))
    out = []
    for name in imported(module, source):
        fits = any(fnmatch(name, p) for p in allowed if p[0] != "!")
        if not fits or any(fnmatch(f"{name}.", f"{p[1:]}") for p in allowed if p[0] == "!"):
            out.append(name)
    return out


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    assert forbidden(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("altprop.errors", "import altprop.rule"),
        ("altprop.assign", "from altprop.rule import AbstractRule"),
        ("altprop.rule", "from altprop.equilibrium.module import Equilibrium"),
        ("altprop.equilibrium.dynamics.dynamics", "from altprop import GatedBlock"),
        ("altprop.equilibrium.module", "from altprop.auditing.memory import peak_live_bytes"),
        (
            "altprop.equilibrium.estimators.aep",
            "from altprop.equilibrium.estimators.ep import EP",
        ),
        (
            "altprop.equilibrium.estimators.aep",
            "from altprop.equilibrium.estimators import implicit",
        ),
        (
            "altprop.equilibrium.solvers.euler",
            "def f():\n    from altprop.equilibrium.solvers.anderson import Anderson",
        ),
        ("altprop.rules.direct", "from altprop.rules.backprop import Backprop"),
        ("altprop.auditing.memory", "from altprop.lm.text import Corpus"),
        ("altprop.audit", "import altprop.lm.text"),
        ("altprop.testing.equilibrium", "from altprop.lm import text"),
        ("altprop.lab.train", "from altprop.equilibrium.module import Equilibrium"),
        ("altprop", "from altprop.lab.cli import main"),
    ],
)
def test_an_import_against_the_direction_is_found(module: str, line: str) -> None:
    assert len(forbidden(module, f"import os, torch\n{line}")) == 1


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the modules of a circle of imports, or nothing."""
    done: set[str] = set()

    def walk(way: list[str]) -> list[str]:
        for name in graph.get(way[-1], ()):
            if name in way:
                return [*way[way.index(name) :], name]
            if name not in done and (found := walk([*way, name])):
                return found
        done.add(way[-1])
        return []

    return next((found for name in graph if name not in done and (found := walk([name]))), [])


def test_no_imports_go_round_in_a_circle() -> None:
    """Those inside functions and those for type checkers alone count too."""
    graph = {name: list(imported(name, path.read_text())) for name, path in MODULES.items()}
    assert circle(graph) == []
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["d", "b"], "d": []}) == ["b", "c", "b"]


def hidden_names(source: str) -> list[str]:
    """Return the names of `altprop` itself that `source` uses and that are not public."""
    public = {*altprop.__all__, "__version__", "__all__"}
    tree = ast.parse(source)
    out, aliases = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "altprop":
            out += [a.name for a in node.names if a.name not in public]
        elif isinstance(node, ast.Import):
            aliases |= {a.asname or a.name for a in node.names if a.name == "altprop"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases and node.attr not in public:
                out.append(node.attr)
    return out


def test_the_application_uses_public_names_only() -> None:
    application = {
        name: path for name, path in MODULES.items() if name.split(".")[1:2] in (["lm"], ["lab"])
    }
    assert application
    for name, path in application.items():
        assert hidden_names(path.read_text()) == [], name
    assert hidden_names("import altprop as ap\nap._WHERE\nap.AEP()") == ["_WHERE"]
    assert hidden_names("from altprop import AEP, agreement") == ["agreement"]


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_every_export_resolves() -> None:
    table = altprop._WHERE
    assert altprop.__all__ == sorted(table) and "AEP" in table
    for name, module in table.items():
        value = getattr(altprop, name)
        assert getattr(value, "__module__", module) == module, name
        assert value.__doc__, f"{name} is public and says nothing about itself"
    assert set(table) <= set(dir(altprop))
    with pytest.raises(AttributeError, match="module 'altprop' has no attribute 'AEPP'"):
        altprop.AEPP  # noqa: B018


def test_importing_altprop_does_not_import_torch() -> None:
    code = "import sys, altprop; altprop.__all__, dir(altprop); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def concrete_parts() -> set[str]:
    """Return the names of all exported rules, solvers, dynamics and stabilisers."""
    exports = {name: getattr(altprop, name) for name in altprop.__all__}
    bases = (
        altprop.AbstractRule,
        altprop.AbstractSolver,
        altprop.AbstractDynamics,
        altprop.AbstractStabiliser,
    )
    return {
        name
        for name, value in exports.items()
        if isinstance(value, type) and issubclass(value, bases) and not name.startswith("Abstract")
    }


def branches_on_names(source: str, own: set[str] = frozenset()) -> list[str]:
    """Return the comparisons in `source` that ask which rule, solver or dynamics something is.

    A method of the part itself, or a table from names to values, is the place for that.
    """
    names = concrete_parts()
    folded = {name.casefold() for name in names}

    def names_a_part(node: ast.expr) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(
            isinstance(p, ast.Constant)
            and isinstance(p.value, str)
            and p.value.casefold() in folded
            or isinstance(p, ast.Attribute)
            and p.attr == "__name__"
            or isinstance(p, ast.Name)
            and p.id in names - own
            or isinstance(p, ast.Attribute)
            and p.attr in names - own
            for p in parts
        )

    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            found = any(names_a_part(side) for side in (node.left, *node.comparators))
            # `if __name__ == "__main__"` compares a Name, not an attribute
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            found = names_a_part(node.args[1])
        elif isinstance(node, ast.MatchValue):
            found = names_a_part(node.value)
        elif isinstance(node, ast.MatchClass):
            found = names_a_part(node.cls)
        else:
            continue
        if found:
            out.append(ast.unparse(node))
    return out


@pytest.mark.parametrize("module", MODULES)
def test_nothing_branches_on_which_rule_it_is(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert branches_on_names(MODULES[module].read_text(), own) == []


@pytest.mark.parametrize(
    "line",
    [
        "if method == 'aep': pass",
        "if type(rule).__name__ == kind: pass",
        "if name in ('EP', 'AEP'): pass",
        "if isinstance(estimator, AEP): pass",
        "x = 1 if type(solver) is ap.Euler else 2",
        "match rule:\n    case AEP(): pass",
        "match name:\n    case 'Anderson': pass",
    ],
)
def test_a_branch_on_a_name_is_found(line: str) -> None:
    assert len(branches_on_names(line)) == 1
    assert branches_on_names("if __name__ == '__main__' and mode == 'zero': pass") == []
