"""The pages about neighbours: anybody can paste their scripts, and they do what they say."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from test_docs import BLOCK, ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours
PAGES = sorted((ROOT / "docs" / "neighbours").glob("*.md"))
SCRIPTS = [page for page in PAGES if not page.stem.startswith("from-")]
LINES = 25
NEEDS = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)
NAMED = {"transformers", "lightning", "accelerate", "peft", "compile", "fsdp2", "optuna"}


def blocks(page: Path) -> list[str]:
    """Return the scripts on a page, or skip where one needs what is not installed."""
    found: list[str] = BLOCK.findall(page.read_text(encoding="utf-8"))
    for name in {name for text in found for name in NEEDS.findall(text)}:
        try:
            importlib.import_module(name)  # Lightning raises anything where it does not fit
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{name} cannot be imported: {error}")
    return found


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder and an environment of its own for each script, and what it logs unseen."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "to be removed again")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_there_is_a_page_for_every_neighbour_and_its_script_is_short() -> None:
    assert {page.stem for page in SCRIPTS} == NAMED
    for page in SCRIPTS:
        (script,) = BLOCK.findall(page.read_text(encoding="utf-8"))
        assert len([line for line in script.splitlines() if line.strip()]) <= LINES, page.name
    for page in set(PAGES) - set(SCRIPTS):  # they need nothing of what one comes from
        text = "".join(BLOCK.findall(page.read_text(encoding="utf-8")))
        assert set(NEEDS.findall(text)) == {"torch", "altprop"}, page.name


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.stem != "fsdp2"], ids=lambda page: page.stem
)
def test_the_script_on_the_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(f"page_{page.stem}")  # importable, so that its classes pickle
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        exec(compile(block, str(page), "exec", dont_inherit=True), module.__dict__)


def test_the_fsdp2_script_ends_at_the_same_weights_on_two_processes(tmp_path: Path) -> None:
    (script,) = blocks(ROOT / "docs" / "neighbours" / "fsdp2.md")
    file = tmp_path / "script.py"
    file.write_text(script, encoding="utf-8")
    with contextlib.redirect_stdout(said := io.StringIO()):
        runpy.run_path(str(file))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*words, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, *both = re.findall(r"weights ([\d.]+)", said.getvalue() + done.stdout)
    assert [float(total) for total in both] == pytest.approx([float(one)] * 2, rel=1e-5)
