"""Train and eval mode of models, switched only when needed, with frozen submodules left frozen."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch.nn import Module

# For each model and mode: the submodules that stood the other way when the model left that mode.
_exceptions: WeakKeyDictionary[Module, dict[bool, list[Module]]] = WeakKeyDictionary()


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
    notes = _exceptions.setdefault(model, {})
    notes[model.training] = [module for module in model.modules() if module.training is not model.training]
    model.train(training)
    for module in notes.get(training, ()):
        module.training = not training
