"""Schedules: pure functions of (done, total, base).

*done* counts what the schedule is stepped by (updates, iterations or epochs) from 0, *total* is their
number in the whole run, and *base* the value that the param group began with. What each returns is in
force for the step number *done*, as in mmcv 1.x: with ``total`` steps, the last one sees
``done == total - 1``, so that no schedule quite reaches its end value; but the one-cycle does.

Any function of the same three arguments is a schedule too. If it has a method ``bound(run, total)``, it is asked
for the schedule within that run when the run is built, and may refuse the run with a ValueError.
"""

from .annealing import cosine, cosine_restarts, flat_cosine, linear, poly
from .cycles import cyclic, one_cycle, one_cycle_momentum
from .options import Schedule
from .plateau import plateau
from .steps import constant, exponential, inverse, multistep, step
from .warmup import warmup

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "exponential",
    "flat_cosine",
    "inverse",
    "linear",
    "multistep",
    "one_cycle",
    "one_cycle_momentum",
    "plateau",
    "poly",
    "step",
    "warmup",
]
