"""Training loops for PyTorch as streams of states that can be stopped, looked into, mended and resumed."""

from typing import TYPE_CHECKING, Any

from . import schedules
from .intervals import epochs, highest, iterations, lowest, rounds, samples, seconds
from .middleware.average import average
from .middleware.backward import backward
from .middleware.checkpoint import checkpoint
from .middleware.clip_grad_norm import clip_grad_norm
from .middleware.forward import forward
from .middleware.log import log
from .middleware.optimize import optimize
from .middleware.schedule_lr import schedule_lr
from .middleware.update import update
from .phases import Phase, train, validate
from .pipeline import chain, pipe
from .state import Plan, Progress, State

if TYPE_CHECKING:
    from .run import Run, workflow

__version__ = "0.1.0"

__all__ = [
    "Phase",
    "Plan",
    "Progress",
    "Run",
    "State",
    "average",
    "backward",
    "chain",
    "checkpoint",
    "clip_grad_norm",
    "epochs",
    "forward",
    "highest",
    "iterations",
    "log",
    "lowest",
    "optimize",
    "pipe",
    "rounds",
    "samples",
    "schedule_lr",
    "schedules",
    "seconds",
    "train",
    "update",
    "validate",
    "workflow",
]


def __getattr__(name: str) -> Any:
    """Load the machine behind a run when one is first made: it is two thirds of the library's import time."""
    if name in ("Run", "workflow"):
        from . import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
