"""Put plausible bugs into the code, one at a time, and see whether the tests notice.

    python tests/mutations.py --quick            all of them: half an hour on two cores
    python tests/mutations.py rules/ phases.py   those of files whose path holds one of these

Each bug is a line changed as a tired hand might change it; the table is in `bugs/`. The tests that
should notice must pass without any, and then run first; only if they pass with the bug does the
whole suite run, and with `--quick` not even then. At the end stands how many were noticed, and the
status is 1 if a twentieth of the table was not, or if one stands there without a reason why
it is none. `tests/test_mutations.py` keeps the table true to the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bugs.bug import Bug
from bugs.table import BUGS

ROOT = Path(__file__).parent.parent
LIMIT = 900  # seconds: a bug that makes the tests run forever is noticed


class Outcome(NamedTuple):
    bug: Bug
    noticed: bool
    how: str


def try_bug(bug: Bug, quick: bool = False) -> Outcome:
    """Run the tests on a copy of the source with this one bug in it; `quick`: its own alone."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        file = source / "altprop" / bug.file
        text = file.read_text()
        if text.count(bug.old) != 1:
            raise SystemExit(f"{bug.file}: {bug.old!r} stands there {text.count(bug.old)} times")
        file.write_text(text.replace(bug.old, bug.new))
        tests = [f"tests/{name}" for name in bug.tests.split()]
        whole = [["tests"]] if not (quick and tests) else []
        for chosen in [tests] * bool(tests) + whole:
            how = _run(chosen, source)
            if how:
                return Outcome(bug, True, how)
    return Outcome(bug, False, "")


def _run(tests: list[str], source: Path, limit: float | None = LIMIT) -> str:
    """Return the first failure of these tests, or nothing; stop if there are no such tests."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    surroundings = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "the tests ran too long"
    if done.returncode == 0:
        return ""
    told = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode > 2:  # no test failed, but pytest found none, or no such file
        raise SystemExit(f"{' '.join(tests)}: {told[-1]}")
    failed = [line for line in told if line.startswith(("FAILED", "ERROR"))]
    return [*failed, *told[-1:], "the tests crashed"][0]


def main(arguments: list[str]) -> int:
    """Try the bugs whose file matches, and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="parts of the paths of the files to take")
    parser.add_argument("--quick", action="store_true", help="run no more than a bug's own tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many bugs at once")
    given = parser.parse_args(arguments)
    wanted = given.patterns or [""]
    chosen = [bug for bug in BUGS if any(pattern in bug.file for pattern in wanted)]
    tests = {f"tests/{name}" for bug in chosen for name in bug.tests.split()}
    if broken := tests and _run(sorted(tests), ROOT / "src", limit=None):
        raise SystemExit(f"the tests fail without any bug, and so could tell none: {broken}")
    missed = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for bug, noticed, how in pool.map(partial(try_bug, quick=given.quick), chosen):
            if not noticed:
                missed.append(bug)
            told = how if noticed else f"NOT NOTICED {bug.harmless and '(' + bug.harmless + ')'}"
            print(f"{bug.file}: {bug.old.strip()} → {bug.new.strip()}\n    {told}", flush=True)
    unexplained = [bug for bug in missed if not bug.harmless]
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} noticed, "
        f"{len(missed) - len(unexplained)} of the others explained"
    )
    return int(len(missed) > 0.05 * len(BUGS) or bool(unexplained))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
