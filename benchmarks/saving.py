"""Measure which share of a default run's time goes into being able to go on from a crash.

    python benchmarks/saving.py [FOLDER]    the folder tells which disk; the working folder's

Times a step, a record, and either kind of checkpoint of `altprop train` as it is by default, on the
disk, and adds up what a run of a thousand steps writes: a record a step, both checkpoints at every
evaluation, and one for each minute between them.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from altprop.lab.run import Run
from altprop.lab.settings import TrainConfig
from altprop.lab.train import begin, steps
from altprop.lm.text import load_corpus
from common import markdown, write

MADE, SAVED = 60, 20


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def main(where: str) -> None:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        config = TrainConfig(out=Path(folder) / "run")
        corpus = load_corpus(config.data)
        state, guard = begin(config, corpus)
        seconds: dict[str, list[float]] = {"step": [], "record": [], "last": [], "best": []}
        with Run.open(config, corpus) as run:
            run.begin(state, next(state.model.parameters()).device)
            made = run.follow(steps(config, state, guard), state)
            for record in itertools.islice(made, MADE):
                seconds["step"].append(config.batch * config.context / record["tokens_per_second"])
                seconds["record"].append(timed(lambda record=record: run.log(record)))
                if state.progress.step > MADE - SAVED:
                    for name, whole in (("best", False), ("last", True)):
                        save = lambda n=name, w=whole: run.save(n, state, resumable=w)  # noqa: E731
                        seconds[name].append(timed(save))
        size = (config.out / "last.safetensors").stat().st_size
    typical = {name: statistics.median(values) for name, values in seconds.items()}
    learning = config.steps * typical["step"]
    evaluations = config.steps // config.eval_every
    times = {
        "step": config.steps,
        "record": config.steps,
        "best": evaluations,
        "last": evaluations + learning / config.save_every,
    }
    rows = [
        [
            *(name, f"{1e3 * typical[name]:.2f}", f"{times[name]:.0f}"),
            f"{100 * times[name] * typical[name] / learning:.2f} %",
        ]
        for name in seconds
    ]
    share = sum(times[n] * typical[n] for n in ("record", "best", "last")) / learning
    table = markdown(["what", "ms, median", "of 1 000 steps", "of the steps' time"], rows)
    said = f"Together {100 * share:.2f} % of a default run; `last` has {size / 1e6:.1f} MB."
    write("saving", "What going on from a crash costs", [table, said], {**typical, "share": share})


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["."]))
