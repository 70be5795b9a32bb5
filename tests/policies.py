"""What an lr_config or momentum_config of mmcv 1.x is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import looptools as lt

KINDS = {"linear": "linear", "exp": "exponential", "constant": "constant"}


def schedule(optimizer: torch.optim.Optimizer, config: dict[str, Any], option: str = "lr") -> lt.schedule:
    """The part that sets *option* as *config* says."""
    warmup: Any = 0
    if config.get("warmup"):
        count = config["warmup_iters"]
        ratio = config.get("warmup_ratio", 0.1 if option == "lr" else 0.9)
        count = lt.epochs(count) if config.get("warmup_by_epoch") else count
        warmup = lt.schedules.warmup(count, ratio=ratio, kind=KINDS[config["warmup"]])
    by_epoch = config.get("by_epoch", True) and config["policy"] not in ("cyclic", "OneCycle")
    make = {"lr": lt.schedule_lr, "momentum": lt.schedule_momentum}[option]
    policy = POLICIES[config["policy"]](config, option)
    return make(optimizer, policy, warmup=warmup, by="epoch" if by_epoch else "update")


def _step(config: dict[str, Any], option: str) -> Any:
    gamma = config.get("gamma", 0.1 if option == "lr" else 0.5)
    kind = lt.schedules.step if isinstance(config["step"], int) else lt.schedules.multistep
    return kind(config["step"], gamma, floor=config.get(f"min_{option}"))


def _annealing(kind: Callable[..., Any]) -> Callable[[dict[str, Any], str], Any]:
    def make(config: dict[str, Any], option: str) -> Any:
        ends = {"end": config.get(f"min_{option}") or 0.0, "end_ratio": config.get(f"min_{option}_ratio")}
        return kind(config, **ends)

    return make


def _cyclic(config: dict[str, Any], option: str) -> Any:
    ratio = config.get("target_ratio", (10, 1e-4) if option == "lr" else (0.85 / 0.95, 1.0))
    up, down = ratio if isinstance(ratio, list | tuple) else (ratio, ratio / 1e5)
    options = {"cycles": "cyclic_times", "rising": "step_ratio_up", "anneal": "anneal_strategy", "gamma": "gamma"}
    given = {name: config[key] for name, key in options.items() if key in config}
    return lt.schedules.cyclic(up, down, **given)


def _one_cycle(config: dict[str, Any], option: str) -> Any:
    options = {"rising": "pct_start", "three_phase": "three_phase", "anneal": "anneal_strategy"}
    options |= {"total": "total_steps", "div": "div_factor", "final_div": "final_div_factor"}
    given = {name: config[key] for name, key in options.items() if key in config}
    if option == "lr":
        return _per_group(lambda peak: lt.schedules.one_cycle(peak, **given), config["max_lr"])
    return _per_group(
        lambda low, high: lt.schedules.one_cycle_momentum(low, high, **given),
        config.get("base_momentum", 0.85),
        config.get("max_momentum", 0.95),
    )


def _per_group(make: Callable[..., Any], *values: Any) -> Any:
    """One schedule, or one for each param group where the values are lists."""
    if not isinstance(values[0], list):
        return make(*values)
    return [make(*one) for one in zip(*values, strict=True)]


POLICIES: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "fixed": lambda config, option: lt.schedules.constant(),
    "step": _step,
    "exp": lambda config, option: lt.schedules.exponential(config["gamma"]),
    "inv": lambda config, option: lt.schedules.inverse(config["gamma"], config.get("power", 1.0)),
    "poly": lambda config, option: lt.schedules.poly(config.get("power", 1.0), end=config.get("min_lr", 0.0)),
    "CosineAnnealing": _annealing(lambda config, **ends: lt.schedules.cosine(**ends)),
    "LinearAnnealing": _annealing(lambda config, **ends: lt.schedules.linear(**ends)),
    "FlatCosineAnnealing": _annealing(
        lambda config, **ends: lt.schedules.flat_cosine(config.get("start_percent", 0.75), **ends)
    ),
    "CosineRestart": _annealing(
        lambda config, **ends: lt.schedules.cosine_restarts(config["periods"], config["restart_weights"], **ends)
    ),
    "cyclic": _cyclic,
    "OneCycle": _one_cycle,
}
