"""Training loops for PyTorch as streams of states that can be stopped, looked into, mended and resumed."""

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
from .run import Run, workflow
from .state import Plan, Progress, State

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
