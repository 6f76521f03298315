"""Put plausible bugs into the code, one at a time, and see whether the tests notice.

    python tests/mutations.py                    all of them: an hour or more on two cores
    python tests/mutations.py rules/ phases.py   those of files whose path holds one of these

Each bug is a line changed as a tired hand might change it. The tests that should notice run first;
only if they pass does the whole suite run. At the end stands what nobody noticed, and the status is
1 if that is more than a twentieth. `tests/test_mutations.py` keeps the table true to the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bugs import BUGS, Bug

ROOT = Path(__file__).parent.parent
LIMIT = 900  # seconds: a bug that makes the tests run forever is noticed


class Outcome(NamedTuple):
    bug: Bug
    noticed: bool
    how: str


def try_bug(bug: Bug) -> Outcome:
    """Run the tests on a copy of the source with this one bug in it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        file = source / "altprop" / bug.file
        text = file.read_text()
        if text.count(bug.old) != 1:
            raise SystemExit(f"{bug.file}: {bug.old!r} stands there {text.count(bug.old)} times")
        file.write_text(text.replace(bug.old, bug.new))
        tests = [f"tests/{name}" for name in bug.tests.split()]
        for chosen in [tests] * bool(tests) + [["tests"]]:
            how = _run(chosen, source)
            if how:
                return Outcome(bug, True, how)
    return Outcome(bug, False, "")


def _run(tests: list[str], source: Path) -> str:
    """Return the first failure of these tests, or nothing."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    surroundings = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return "the tests ran too long"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0] if lines else (done.stdout + done.stderr).strip().splitlines()[-1]


def main(patterns: list[str]) -> int:
    """Try the bugs whose file matches, and print what became of each."""
    chosen = [bug for bug in BUGS if not patterns or any(p in bug.file for p in patterns)]
    missed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bug, noticed, how in pool.map(try_bug, chosen):
            if not noticed:
                missed.append(bug)
            told = how if noticed else f"NOT NOTICED {bug.harmless and '(' + bug.harmless + ')'}"
            print(f"{bug.file}: {bug.old.strip()} → {bug.new.strip()}\n    {told}", flush=True)
    unexplained = [bug for bug in missed if not bug.harmless]
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} noticed, "
        f"{len(missed) - len(unexplained)} of the others explained"
    )
    return int(len(missed) > 0.05 * len(chosen) or bool(unexplained))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
