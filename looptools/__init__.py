"""Training loops for PyTorch as streams of states that can be stopped, looked into, mended and resumed."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# A name is loaded when it is first used, so that `import looptools` costs next to nothing.
_HOMES = {
    "Phase": "phases",
    "Plan": "state",
    "Progress": "state",
    "Run": "run",
    "State": "state",
    "average": "middleware.average",
    "backward": "middleware.backward",
    "chain": "pipeline",
    "checkpoint": "middleware.checkpoint",
    "clip_grad_norm": "middleware.clip_grad_norm",
    "epochs": "intervals",
    "forward": "middleware.forward",
    "highest": "intervals",
    "iterations": "intervals",
    "log": "middleware.log",
    "lowest": "intervals",
    "optimize": "middleware.optimize",
    "pipe": "pipeline",
    "rounds": "intervals",
    "samples": "intervals",
    "schedule_lr": "middleware.schedule_lr",
    "seconds": "intervals",
    "train": "phases",
    "update": "middleware.update",
    "validate": "phases",
    "workflow": "run",
}

if not TYPE_CHECKING:  # a type checker knows the names from above, and should complain of any other

    def __getattr__(name: str) -> Any:
        if name == "schedules":
            return importlib.import_module(f"{__name__}.schedules")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
