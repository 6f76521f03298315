"""The pages of the reference hold every public name once, by the path that it is imported by."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import yaml

import altprop
import altprop.testing

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
PUBLIC = {
    *(f"altprop.{name}" for name in altprop.__all__),
    *(f"altprop.testing.{name}" for name in altprop.testing.__all__),
}
# Imported from where they are: the application, and one module that is public as a whole.
BY_MODULE = ("altprop.lm.", "altprop.lab.", "altprop.equilibrium.dynamics.analytic")


def directives() -> list[str]:
    """Return what every `:::` on the pages asks to be shown."""
    return [
        name
        for page in PAGES
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def exists(path: str) -> bool:
    """Say whether `path` is a module, or what a module holds."""
    module, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.import_module(path))
    except ImportError:
        return False


def test_the_reference_shows_every_public_name_once_and_by_its_public_path() -> None:
    shown = [name for name in directives() if not name.startswith(BY_MODULE)]
    assert [name for name, count in Counter(shown).items() if count > 1] == []
    assert set(shown) == PUBLIC


def test_what_the_reference_shows_by_its_module_exists_and_is_not_private() -> None:
    shown = [name for name in directives() if name.startswith(BY_MODULE)]
    assert shown and [name for name, count in Counter(shown).items() if count > 1] == []
    assert [name for name in shown if not exists(name) or "._" in name] == []
    assert not exists("altprop.lab.train.no_such_name")


def test_the_first_page_of_the_reference_links_every_public_name_to_its_place() -> None:
    text = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^]]*\]\((\S+)\.md\) \| (.*) \|$", text, re.MULTILINE)
    for page, names in rows:
        links = re.findall(r"\[`(\w+)`\]\[(\S+?)\]", names)
        assert [path.rpartition(".")[2] for _, path in links] == [name for name, _ in links]
        source = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
        assert all(f"\n::: {path}\n" in source for _, path in links), page
    linked = re.findall(r"\]\[(\S+?)\]", text)
    assert sorted(linked) == sorted(PUBLIC)


def test_every_page_stands_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, str):
            pages.append(node)
        for child in node.values() if isinstance(node, dict) else node if node != str(node) else ():
            walk(child)

    walk(yaml.safe_load(text)["nav"])
    docs = ROOT / "docs"
    assert sorted(pages) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))
