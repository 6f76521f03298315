"""The page itself: one HTML file that loads nothing from anywhere.

Its charts are drawn in the browser by Observable Plot, whose script (and D3's, which it stands on)
lies in `static/` as its makers publish it. A content security policy lets these scripts run and
nothing else, and keeps the page from fetching anything.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import altprop
from altprop.lab.reporting.markup import Markup, embedded, markup, section, table, tag

SCRIPTS = ("d3.min.js", "plot.umd.min.js", "charts.js", "report.js")


@cache
def static(name: str) -> Markup:
    """Return the text of a file that belongs to the pages."""
    files = resources.files("altprop.lab.reporting")
    return Markup((files / "static" / name).read_text(encoding="utf-8"))


def page(title: str, body: Markup, data: object) -> str:
    """Return a whole page.

    **Arguments:** `data`, what the charts are drawn from, as JSON can hold it.
    """
    scripts = [static(name) for name in SCRIPTS]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
    head = markup(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", static("report.css")),
    )
    nothing = tag("noscript", tag("p", "The charts need JavaScript; the tables do not."))
    content = markup(
        tag("main", nothing, body),
        tag("script", embedded(data), type="application/json", id="data"),
        *(tag("script", script) for script in scripts),
    )
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{content}</body></html>\n'
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no bytes


def again(record: Mapping[str, Any], options: str, data: str) -> Markup:
    """Return the part of a page that says how to compute the same again.

    **Arguments:** `record`, what the folder says of it; `options`, the text of its
    configuration; `data`, where the data are from.
    """
    facts = {
        "command": tag("code", record["command"]) if "command" in record else None,
        "versions": ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items()),
        "machine": record.get("machine"),
        "threads": record.get("threads"),
        **{name: record[name] for name in ("started",) if name in record},  # of comparisons
        "data": data,
        "this page": f"{time.strftime('%Y-%m-%d %H:%M')}, altprop {altprop.__version__}",
    }
    rows = [(tag("strong", name), said or "not recorded") for name, said in facts.items()]
    shown = table(("", ""), rows, class_="record")
    return section("How to do it again", shown, tag("pre", options), id="again")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
