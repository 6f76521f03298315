"""The page of a comparison: its first screen says which rule came how close to backprop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from altprop.lab.reporting.comparison import Comparison
from altprop.lab.reporting.markup import Markup, chart, finite, markup, name, section, table, tag
from altprop.lab.reporting.numbers import duration, few_seeds, interval, large, number
from altprop.lab.reporting.page import again, page
from altprop.lab.reporting.thin import average, most_points, thin

Arm = Mapping[str, Any]
_REFERENCE = "backprop"  # the control that the others are compared with


def comparison_page(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    results, arms = comparison.results, comparison.arms
    rules = [arm for arm in arms if not arm["control"]]
    title = f"{results['task']['name']}: {len(rules)} {_plural('rule', rules)}"
    if any(arm["rule"] == _REFERENCE for arm in arms):
        title += f" beside {_REFERENCE}"
    sections = (
        _closeness(results),
        _failures(arms),
        _curves(arms),
        _figures(results, arms),
        _audits(arms),
        _reading(arms),
        _rates(arms),
        again(comparison.record, comparison.options, results["task"]["data"]),
    )
    body = markup(_head(title, results, arms), *sections)
    return page(title, body, chart_data(comparison))


def chart_data(comparison: Comparison) -> dict[str, Any]:
    """Return what the charts of a comparison are drawn from."""
    task, steps = comparison.results["task"], comparison.results["steps"]
    most = most_points(sum(len(arm["curves"]) for arm in comparison.arms))
    return {
        "score": {**{k: task[k] for k in ("unit", "better")}, "name": task["score"]},
        "chance": finite(task["chance"]),
        "steps": steps,
        "start": "recovery" if _gains(comparison.results, comparison.arms) else "score",
        "arms": [_drawn(arm, task["unit"], most) for arm in comparison.arms],
    }


def _drawn(arm: Arm, unit: str, most: int) -> dict[str, Any]:
    """Return of an arm what is drawn, and the labels beside it."""
    cost = arm["cost"] or {}
    curves = arm["curves"]
    return {
        "name": arm["name"],
        "rule": arm["rule"],
        "control": arm["control"],
        "values": {
            "recovery": _value(arm["recovery"], "%", 100),
            "score": _value(arm, unit),
            "difference": _value(arm["difference"], _points(unit), signed=True),
            "equal_cost": _value(arm["equal_cost"], unit),
        },
        "relative": finite(cost.get("relative")),
        "seconds": finite(cost.get("seconds_per_step")),
        "curves": [
            {"seed": c["seed"], **thin({k: c[k] for k in ("steps", "loss", "score")}, most)}
            for c in curves
        ],
        "average": thin(average(curves), most),
        "audit": [
            {"step": a["step"], "groups": [{**g, **_numbers(g)} for g in a["groups"]]}
            for a in arm["audit"] or ()
        ],
        "rates": [{**rate, "score": finite(rate["score"])} for rate in arm["rates"] or ()],
        "lr": arm["lr"],
        "edge": arm["edge"],
    }


def _numbers(group: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: finite(group[name]) for name in ("cosine", "ratio")}


def _value(
    found: Mapping[str, Any] | None, unit: str, scale: float = 1.0, *, signed: bool = False
) -> dict[str, Any] | None:
    """Return a mean with its interval and the words for both, or nothing where there is none."""
    if found is None or finite(found["mean"]) is None:
        return None
    mean, bounds = scale * found["mean"], found["interval"]
    ends = [None if b is None or finite(b) is None else scale * b for b in bounds or (None, None)]
    return {
        "mean": finite(mean),
        "interval": None if None in ends else [finite(end) for end in ends],
        "label": interval(mean, ends, unit, signed=signed),
    }


def _points(unit: str) -> str:
    """Return the unit of a difference."""
    return "points" if unit == "%" else unit


def _head(title: str, results: Mapping[str, Any], arms: Sequence[Arm]) -> Markup:
    task = results["task"]
    seeds = len(results["seeds"])
    facts = [
        f"{seeds} {_plural('seed', results['seeds'])} × {results['steps']:,} steps",
        f"{task['score']} ({task['unit']}), {task['better']} is better",
        task["data"],
    ]
    doubt = markup()
    if not results["finished"]:
        done = sum(None not in arm["scores"] and len(arm["scores"]) == seeds for arm in arms)
        said = f"Not finished: {done} of {len(arms)} arms have a score of every seed."
        doubt = tag("p", said, class_="warning")
    return tag(
        "header", tag("h1", title), tag("p", " · ".join(facts), class_="facts"), doubt,
        tag("p", verdict(results, arms), class_="verdict"),
    )  # fmt: skip


def verdict(results: Mapping[str, Any], arms: Sequence[Arm]) -> Markup:
    """Return in a sentence or two which rule came how close to backprop."""
    unit = results["task"]["unit"]
    scored = [arm for arm in arms if not arm["control"] and arm["mean"] is not None]
    if not scored:
        return markup("No rule has a score yet.")
    rules = [arm for arm in scored if not few_seeds(arm["scores"])]
    if not rules:
        return markup("No rule has a score at every seed.")
    judged = [arm for arm in rules if arm["recovery"] and arm["recovery"]["mean"] is not None]
    if judged and _gains(results, arms):
        best = max(judged, key=lambda arm: arm["recovery"]["mean"])
        recovery = _value(best["recovery"], "%", 100)
        assert recovery is not None
        said = markup(
            tag("strong", best["name"]), " recovers the most of backprop's gain over frozen ",
            "hidden layers: ", tag("strong", recovery["label"]), ".",
        )  # fmt: skip
    else:
        best = rules[0]
        score = interval(best["mean"], best["interval"], unit)
        said = markup(tag("strong", best["name"]), " scores best, with ", tag("strong", score), ".")
    signs = [_sign(arm["difference"], results) for arm in rules]
    signs = [sign for sign in signs if sign is not None]
    if signs:
        counts = ((signs.count(1), "better than"), (signs.count(0), "not told from"),
                  (signs.count(-1), "worse than"))  # fmt: skip
        told = ", ".join(f"{count} {what}" for count, what in counts if count)
        rest = " backprop, by the paired differences' 95 % intervals."
        said = markup(said, f" Of {len(signs)} {_plural('rule', signs)}: {told}{rest}")
    if left := len(scored) - len(rules):
        said = markup(said, f" Left out, for seeds that failed: {left}.")
    if any(arm["rule"] == "frozen" for arm in arms) and not _gains(results, arms):
        why = " Backprop itself is not shown to beat frozen hidden layers: no recovery is known."
        said = markup(said, why)
    return said


def _gains(results: Mapping[str, Any], arms: Sequence[Arm]) -> bool:
    """Tell whether backprop is better than frozen hidden layers, by the seeds' pairs."""
    frozen = next((arm["difference"] for arm in arms if arm["rule"] == "frozen"), None)
    return _sign(frozen, results) == -1


def _sign(found: Mapping[str, Any] | None, results: Mapping[str, Any]) -> int | None:
    """Return 1 for better than backprop, −1 for worse, 0 where an interval tells neither."""
    if found is None or not _has_interval(found):
        return None
    low, high = found["interval"]
    sign = 1 if results["task"]["better"] == "higher" else -1
    return 0 if low <= 0 <= high else sign if low > 0 else -sign


def _has_interval(found: Mapping[str, Any] | None) -> bool:
    return found is not None and found["interval"] is not None and None not in found["interval"]


def _closeness(results: Mapping[str, Any]) -> Markup:
    seeds = len(results["seeds"])
    caption = (
        "Recovery: (rule − frozen) / (backprop − frozen), from the seeds' pairs. The lines are "
        f"95 % intervals over {seeds} {_plural('seed', results['seeds'])}, without failed ones."
    )
    return section("How close to backprop", chart("closeness", caption), id="closeness")


def _failures(arms: Sequence[Arm]) -> Markup:
    rows = [(name(arm["name"]), "refused", arm["refused"]) for arm in arms if arm["refused"]]
    rows += [(name(arm["name"]), "failed", arm["failed"]) for arm in arms if arm["failed"]]
    if not rows:
        return markup()
    return section("Refused or failed", table(("arm", "", "why"), rows), id="failures")


def _curves(arms: Sequence[Arm]) -> Markup:
    if not any(arm["curves"] for arm in arms):
        return markup()
    caption = "Thick: the mean over the seeds; thin: each seed. Choose the arms by their names."
    return section("Curves", chart("curves", caption), id="curves")


def _figures(results: Mapping[str, Any], arms: Sequence[Arm]) -> Markup:
    unit = results["task"]["unit"]
    head = (
        *("arm", results["task"]["score"], "paired difference", "recovery", "at equal cost"),
        *("learning rate", "cost of a step", "time of a step", "evaluations", "peak memory"),
        *("carried backwards", "parameters"),
    )
    rows = []
    for arm in arms:
        cost = arm["cost"] or {}
        values = [
            interval(arm["mean"], arm["interval"], unit) + few_seeds(arm["scores"]),
            _label(arm["difference"], _points(unit), signed=True),
            _label(arm["recovery"], "%", 100),
            _label(arm["equal_cost"], unit),
        ]
        rate = number(arm["lr"]) + (" (edge)" if arm["edge"] else "")
        relative = cost.get("relative")
        costs = [
            "–" if relative is None else f"{number(relative, 3)} ×",
            duration(cost.get("seconds_per_step")),
            number(cost.get("evaluations")),
            large(cost.get("peak_bytes"), "B"),
            large(cost.get("carried_numbers")),
            large(cost.get("parameters")),
        ]
        rows.append((name(arm["name"]), *values, rate, *costs))
    note = tag(
        "p",
        "Means with 95 % intervals. The paired difference is the arm minus backprop, seed by seed. "
        "The cost of a step is in backprop's steps; at equal cost an arm has spent what backprop "
        "spends in all of its steps. Carried backwards: weights other than the forward ones. Edge: "
        "the best rate is the last that was tried.",
        class_="note",
    )
    return section("Figures", table(head, rows, class_="first sortable"), note, id="figures")


def _label(
    found: Mapping[str, Any] | None, unit: str, scale: float = 1.0, *, signed: bool = False
) -> str:
    value = _value(found, unit, scale, signed=signed)
    return "–" if value is None else value["label"]


def _audits(arms: Sequence[Arm]) -> Markup:
    maps = [
        chart("audit", "", data_arm=index, id=f"audit-{index}")
        for index, arm in enumerate(arms)
        if arm["audit"]
    ]
    if not maps:
        return markup()
    note = tag(
        "p",
        "Each rule's gradient beside the exact one, by layer and along training (first seed). The "
        "number at the end of a row is that of the last audit.",
        class_="note",
    )
    controls = tag("div", class_="controls", id="audit-controls")
    return section(
        "Gradients along training", note, controls, tag("div", *maps, class_="grid"), id="audits"
    )


def _reading(arms: Sequence[Arm]) -> Markup:
    rows = []
    for arm in arms:
        ways: dict[str, list[str]] = {}
        for found in arm["read"] or ():
            ways.setdefault(found["how"], []).append(found["parameter"])
        rows += [
            (name(arm["name"]) if first else "", how, _counted(names))
            for first, (how, names) in zip([True] + [False] * len(ways), ways.items(), strict=False)
        ]
    if not rows:
        return markup()
    note = tag(
        "p",
        "How the weights were read while gradients were made, in one step of each arm: backprop "
        "carries a cotangent through every weight as a matrix.",
        class_="note",
    )
    shown = table(("arm", "how", "parameters"), rows, class_="first")
    return section("What was read backwards", note, shown, id="read")


def _counted(names: Sequence[str]) -> Markup:
    """Return names in one cell, behind their number where they are many."""
    if len(names) <= 4:
        return name(", ".join(names))
    return tag("details", tag("summary", f"{len(names)} parameters"), name(", ".join(names)))


def _rates(arms: Sequence[Arm]) -> Markup:
    if not any(arm["rates"] for arm in arms):
        return markup()
    caption = "Each arm's own search: the ring is the chosen rate, a cross is one that failed."
    return section("The search for a rate", chart("rates", caption), id="rates")


def _plural(word: str, things: Sequence[object]) -> str:
    return word if len(things) == 1 else f"{word}s"
