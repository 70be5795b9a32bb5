"""The beginning of an iteration, put in place for a while; then the present again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.nn import Parameter

from ..checkpoints.inventory import inventory
from ..cursor import Cursor
from .moment import Moment

T = TypeVar("T")


class _Present:
    """Everything as it is now, with all gradients."""

    def __init__(self, cursor: Cursor) -> None:
        models = inventory(cursor).modules.values()
        parameters = {id(parameter): parameter for model in models for parameter in model.parameters()}.values()
        self._gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in parameters]
        self._moment = Moment(cursor)
        self._moment.note()

    def put_back(self) -> None:
        self._moment.put_back(files=False)
        for parameter, gradient, content in self._gradients:
            _put(parameter, gradient, content)


def _put(parameter: Parameter, gradient: Tensor | None, content: Tensor | None) -> None:
    parameter.grad = gradient
    if gradient is not None and content is not None:  # of an accumulation window: it was changed in place
        gradient.data.copy_(content)


def at_the_beginning(cursor: Cursor, beginning: Moment, action: Callable[[], T]) -> T:
    """Do *action* with everything as it was at the *beginning*; then have everything be as it is now.

    Ctrl-C may strike anywhere in here, once: the present is put back all the same.
    """
    present = _Present(cursor)
    try:
        try:
            beginning.put_back(files=False)
            return action()
        finally:
            present.put_back()
    except KeyboardInterrupt:
        present.put_back()  # it may have struck in the line above
        raise
