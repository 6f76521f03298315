"""The reference problem: published estimators beside the exact gradient."""

from __future__ import annotations

from collections.abc import Mapping

from altprop import audit_trials
from altprop.lab.reference import REFERENCE, Sizes, make_arms, make_trial
from altprop.lab.reproduce.figure import Figure, known
from altprop.lm.text import load_corpus

PUBLISHED = {
    "EP (published)": 0.76,
    "AEP (published)": 0.988,
    "AEP (published, T2=40)": 0.96,
    "AEP (published, T2=80)": 0.82,
    "AEP (published, T2=160)": 0.57,
    "AEP": None,
    "Implicit": None,
}


def measure(seed: int) -> Mapping[str, float]:
    """Return the mean cosine of the four attention matrices' gradients, by estimator."""
    arms = [arm for arm in make_arms(phase_steps=100) if arm.describe().name in PUBLISHED]
    trial = make_trial(load_corpus("plays"), Sizes(), seed)
    report = audit_trials([trial], arms, REFERENCE, repeats=0)
    return {row.arm.name: known(row.mean("cosine").mean) for row in report.rows}


FIGURE = Figure(
    title="Gradients on the reference problem",
    source="this project's own, before the library, with the relaxation and nudge of Scurria et "
    "al., arXiv 2602.03670, on Shakespeare's characters; no figures of that paper",
    column="prototype",
    setting="Damped attention (B = 16, T = 64, C = 128, H = 4), 120 Euler steps of 0.1, a nudge of "
    "0.02 on the mean cross-entropy; cosine to backpropagation through the relaxation, mean of "
    "the four matrices",
    unit="cosine",
    published=PUBLISHED,
    measure=measure,
    seeds=5,
    differs="The built-in plays in place of tiny Shakespeare; the published forms vary by some "
    "hundredths from seed to seed, and the prototype's figure is that of one",
)
