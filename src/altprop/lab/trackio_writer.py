"""Hands to trackio what it reads, one JSON object a line; `trackers.Trackio` starts it.

The first line is what `trackio.init` takes, each later one the figures of a step.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Write until the input ends, and make sure that it has arrived."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    begin = json.loads(sys.stdin.readline())
    # what runs beside it is nobody's figure, and a notebook asks for no page of it
    run = trackio.init(**begin, embed=False, auto_log_gpu=False, auto_log_cpu=False)
    last = None
    for line in sys.stdin:
        figures = json.loads(line)
        last = figures.pop("step")
        run.log(figures, step=last)
    trackio.finish()
    arrived = SQLiteStorage.get_max_step_for_run(begin["project"], begin["name"], run_id=run.id)
    if last is not None and arrived != last:  # for trackio only warns of what it cannot write
        sys.exit(f"step {last} was given, and step {arrived} is the last there")


if __name__ == "__main__":
    main()
