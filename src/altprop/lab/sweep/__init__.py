"""Options of `altprop train` searched by Optuna: see `sweep`."""

from altprop.lab.sweep.command import SweepResult as SweepResult
from altprop.lab.sweep.command import sweep as sweep
