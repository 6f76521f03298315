"""Rules compared fairly on one task: see `compare`."""

from altprop.lab.compare.comparison import compare as compare
from altprop.lab.compare.results import Comparison as Comparison
