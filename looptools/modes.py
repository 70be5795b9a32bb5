"""Train and eval mode of models, with frozen submodules left frozen; and torch's own modes, for whoever checks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.nn import Module

# For each model and mode: the submodules that stood the other way when the model left that mode.
_exceptions: WeakKeyDictionary[Module, dict[bool, list[Module]]] = WeakKeyDictionary()
# For each module: the flag it had before a model that it belongs to was switched, and which one that was.
_displaced: WeakKeyDictionary[Module, tuple[bool, ref[Module]]] = WeakKeyDictionary()


class Switches:
    """How many switches there were: who sees the number changed must `settle` its model again."""

    count = 0


def settle(model: Module, training: bool) -> None:
    """See that *model* is in train or eval mode, also where a part of it was switched as a model of its own.

    Example:
        >>> import torch
        >>> inner = torch.nn.Dropout()
        >>> outer = torch.nn.Sequential(inner)
        >>> set_mode(inner, False)  # a validation of the inner model alone
        >>> settle(outer, True)
        >>> inner.training
        True
    """
    if model.training is not training:
        set_mode(model, training)
        return
    for module in model.modules():
        flag, by = _displaced.get(module, (False, None))
        if by is not None and by() is not model:
            module.training = flag
            del _displaced[module]


def set_mode(model: Module, training: bool) -> None:
    """Put *model* into train or eval mode, as ``model.train(training)`` does, but keep what was frozen.

    Before the switch, the submodules whose flag differs from the model's own are noted; when the model
    comes back to that mode, they get their flag back. The notes are per model, so that two runs that
    take turns over one model agree.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Dropout())
        >>> _ = model[0].eval()
        >>> set_mode(model, False)
        >>> set_mode(model, True)
        >>> model[0].training, model[1].training
        (False, True)
    """
    Switches.count += 1
    notes = _exceptions.setdefault(model, {})
    modules, me = list(model.modules()), ref(model)
    notes[model.training] = [module for module in modules if module.training is not model.training]
    for module in modules:
        _displaced[module] = (module.training, me)
    flags = [module.training for module in modules]
    try:
        model.train(training)
        for module in notes.get(training, ()):
            module.training = not training
    except BaseException:  # Ctrl-C in the middle: the root's flag, which is looked at, would hide the others
        for module, flag in zip(modules, flags, strict=True):
            vars(module)["training"] = flag
        raise


def torch_modes() -> tuple[bool, ...]:
    """Whether gradients, inference_mode, and autocast on CPU and CUDA are on: what generators leave switched."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def all_torch_modes() -> tuple[Any, ...]:
    """`torch_modes`, and what is switched more rarely; takes 1 µs."""
    torch.autocast_increment_nesting()
    return (
        *torch_modes(),
        torch.autocast_decrement_nesting(),
        torch.get_deterministic_debug_mode(),
        torch.is_anomaly_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),  # torch.get_default_device() takes 3 µs, and makes a tensor
    )


def _set_inference_mode(on: bool) -> None:
    guard = torch.inference_mode(on)  # there is no other way to set it;
    guard.__enter__()
    _entered.append(guard)  # and it would be left again when the guard goes


def _set_nesting(depth: int) -> None:
    while (now := torch.autocast_increment_nesting() - 1) != depth:
        torch.autocast_decrement_nesting()
        (torch.autocast_decrement_nesting if now > depth else torch.autocast_increment_nesting)()
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _set_function_modes(depth: int) -> None:
    if torch._C._len_torch_function_stack() > depth:
        torch.set_default_device(None)


_entered: list[Any] = []
_SETTERS: dict[str, Callable[[Any], object]] = {  # in the order of all_torch_modes
    "gradients": torch.set_grad_enabled,
    "inference_mode": _set_inference_mode,
    "autocast on the CPU": lambda on: torch.set_autocast_enabled("cpu", on),
    "autocast on CUDA": lambda on: torch.set_autocast_enabled("cuda", on),
    "autocast's nesting": _set_nesting,
    "deterministic algorithms": torch.set_deterministic_debug_mode,
    "anomaly detection": torch.set_anomaly_enabled,
    "the default dtype": torch.set_default_dtype,
    "the default device": _set_function_modes,
}


def switched(before: tuple[Any, ...]) -> list[str]:
    """The names of torch's modes that are not as they were *before*, when one of the functions above was called.

    Example:
        >>> import torch
        >>> before = torch_modes()
        >>> with torch.no_grad():
        ...     switched(before)
        ['gradients']
    """
    now = torch_modes() if len(before) == len(torch_modes()) else all_torch_modes()
    return [name for name, was, value in zip(_SETTERS, before, now, strict=False) if was != value]


def put_back(before: tuple[Any, ...]) -> list[str]:
    """Set torch's modes to what they were *before*, and return the names of those that would not have it."""
    values = dict(zip(_SETTERS, before, strict=False))
    for _ in range(2):  # setting inference_mode switches gradients too
        for name in reversed(switched(before)):
            _SETTERS[name](values[name])
    return switched(before)
