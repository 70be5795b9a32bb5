"""Train and eval mode of models, switched only when needed, with frozen submodules left frozen."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

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
    model.train(training)
    for module in notes.get(training, ()):
        module.training = not training
