"""Training loops for PyTorch as streams of states that can be stopped, looked into, mended and resumed."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import schedules, sinks
    from .checkpoints.verify import verify
    from .checkpoints.weights import load_weights, save_weights
    from .curves import plot
    from .data.seeded import seeded
    from .generators import seed_everything
    from .groups import param_groups
    from .intervals import epochs, highest, iterations, lowest, rounds, samples, seconds, target
    from .middleware.average import average
    from .middleware.backward import backward
    from .middleware.checkpoint import checkpoint
    from .middleware.clip_grad_norm import clip_grad_norm
    from .middleware.clip_grad_value import clip_grad_value
    from .middleware.early_stop import early_stop
    from .middleware.ema import ema
    from .middleware.flight_recorder import flight_recorder
    from .middleware.forward import forward
    from .middleware.freeze import freeze
    from .middleware.grad_noise import grad_noise
    from .middleware.leak_guard import leak_guard
    from .middleware.log import log
    from .middleware.measure import measure
    from .middleware.memory import memory
    from .middleware.nan_guard import nan_guard
    from .middleware.optimize import optimize
    from .middleware.profile import profile
    from .middleware.schedule import schedule
    from .middleware.schedule_lr import schedule_lr
    from .middleware.schedule_momentum import schedule_momentum
    from .middleware.stop_after import stop_after
    from .middleware.swa import swa
    from .middleware.timer import timer
    from .middleware.unused_params import unused_params
    from .middleware.update import update
    from .middleware.update_by_closure import update_by_closure
    from .middleware.watch import watch
    from .phases import Phase, train, validate
    from .pipeline import chain, pipe
    from .run import Run, workflow
    from .state import Plan, Progress, State
    from .stepping.divergence import first_divergence
    from .stepping.lr_find import lr_find
    from .stepping.reopen import reopen
    from .stepping.snapshots import snapshots
    from .trials.verify_resume import verify_resume

__version__ = "0.4.0"

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
    "clip_grad_value",
    "early_stop",
    "ema",
    "epochs",
    "first_divergence",
    "flight_recorder",
    "forward",
    "freeze",
    "grad_noise",
    "highest",
    "iterations",
    "leak_guard",
    "load_weights",
    "log",
    "lowest",
    "lr_find",
    "measure",
    "memory",
    "nan_guard",
    "optimize",
    "param_groups",
    "pipe",
    "plot",
    "profile",
    "reopen",
    "rounds",
    "samples",
    "save_weights",
    "schedule",
    "schedule_lr",
    "schedule_momentum",
    "schedules",
    "seconds",
    "seed_everything",
    "seeded",
    "sinks",
    "snapshots",
    "stop_after",
    "swa",
    "target",
    "timer",
    "train",
    "unused_params",
    "update",
    "update_by_closure",
    "validate",
    "verify",
    "verify_resume",
    "watch",
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
    "clip_grad_value": "middleware.clip_grad_value",
    "early_stop": "middleware.early_stop",
    "ema": "middleware.ema",
    "epochs": "intervals",
    "first_divergence": "stepping.divergence",
    "flight_recorder": "middleware.flight_recorder",
    "forward": "middleware.forward",
    "freeze": "middleware.freeze",
    "grad_noise": "middleware.grad_noise",
    "highest": "intervals",
    "iterations": "intervals",
    "leak_guard": "middleware.leak_guard",
    "load_weights": "checkpoints.weights",
    "log": "middleware.log",
    "lowest": "intervals",
    "lr_find": "stepping.lr_find",
    "measure": "middleware.measure",
    "memory": "middleware.memory",
    "nan_guard": "middleware.nan_guard",
    "optimize": "middleware.optimize",
    "param_groups": "groups",
    "pipe": "pipeline",
    "plot": "curves",
    "profile": "middleware.profile",
    "reopen": "stepping.reopen",
    "rounds": "intervals",
    "samples": "intervals",
    "save_weights": "checkpoints.weights",
    "schedule": "middleware.schedule",
    "schedule_lr": "middleware.schedule_lr",
    "schedule_momentum": "middleware.schedule_momentum",
    "seconds": "intervals",
    "seed_everything": "generators",
    "seeded": "data.seeded",
    "snapshots": "stepping.snapshots",
    "stop_after": "middleware.stop_after",
    "swa": "middleware.swa",
    "target": "intervals",
    "timer": "middleware.timer",
    "train": "phases",
    "unused_params": "middleware.unused_params",
    "update": "middleware.update",
    "update_by_closure": "middleware.update_by_closure",
    "validate": "phases",
    "verify": "checkpoints.verify",
    "verify_resume": "trials.verify_resume",
    "watch": "middleware.watch",
    "workflow": "run",
}

if not TYPE_CHECKING:  # a type checker knows the names from above, and should complain of any other

    def __getattr__(name: str) -> Any:
        if name in ("schedules", "sinks"):
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
