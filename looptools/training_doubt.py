"""Whether anybody trains: asked once a run is under way, of phases whose pipe does not show it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import register_optimizer_step_post_hook

from .cursor import Cursor
from .order import FILL, MOVE, OWN, Line, lines
from .state import State

Written = tuple[list[Any], list[Any]]  # marks of weights, of gradients


def training_doubt(cursor: Cursor) -> Doubt | None:
    """What has to be asked once the run is under way: whether anybody trains. None where the pipe shows it."""
    unsure = [
        line
        for line in lines(cursor)
        if line.phase.trains
        and line.phase.step.step is not None  # the model's own train_step may do all by itself
        and isinstance(line.phase.model, Module)
        and not (line.of(FILL) and line.of(MOVE))
        and not line.of(OWN)
    ]
    return Doubt(cursor, unsure) if unsure else None


class Doubt:
    """Looks whether weights move, in training phases where no part of the pipe is seen to do it.

    The step or the body of the user's own loop may. So it waits until an iteration and what follows it are over, and
    looks for gradients, for weights that were written to, and for an optimizer that stepped: a fused one writes unseen.

    Args:
        cursor: The run's machine; it calls this before each iteration, as long as it is in question.
        lines: The phases in question.
    """

    def __init__(self, cursor: Cursor, lines: Iterable[Line]) -> None:
        self.cursor = cursor
        self.lines = {line.name: line for line in lines}
        self.before: dict[str, Written] = {}
        self.stepped = False
        doubt = weakref.ref(self)

        def note(*_: object) -> None:
            if (it := doubt()) is not None:
                it.stepped = True

        self.settle = weakref.finalize(self, register_optimizer_step_post_hook(note).remove)

    def __call__(self) -> None:
        state = self.cursor.handed
        if state is not None and state.phase in self.lines:
            self._judge(self.lines[state.phase], state)
        if self.cursor.passes.phase is None:  # the pass that begins may be one of theirs
            self.before = {name: _written(line.phase.model) for name, line in self.lines.items()}
            self.stepped = False

    def _judge(self, line: Line, state: State) -> None:
        moves, filled = (
            now != then for now, then in zip(_written(line.phase.model), self.before[line.name], strict=True)
        )
        moves = moves or self.stepped
        if filled and not moves and not state.last:
            return  # its update may be still to come
        del self.lines[line.name]
        if not self.lines:
            self.cursor.unsure = None
            self.settle()
        if not moves and state.loss is not None and state.loss.requires_grad:
            warnings.warn(_nothing_moves(line, filled), stacklevel=2)


def _written(model: Module) -> Written:
    """How often weights and gradients have been written to; read on the host."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    return [_version(p) for p in parameters], [None if g is None else (id(g), _version(g)) for g in gradients]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _nothing_moves(line: Line, filled: bool) -> str:
    if not filled:
        return f"{line.name}: nobody calls backward, so nothing is trained. Pipe lt.optimize(optimizer) on."
    if line.of(MOVE):
        return (
            f"{line.name}: no weight has moved, since update waits for backward to say when. Leave backward out of the "
            "step, and pipe lt.optimize(optimizer) on."
        )
    return (
        f"{line.name}: there are gradients, but no weight has moved. Pipe lt.update(optimizer) on behind backward, or "
        "lt.optimize(optimizer) in place of both."
    )
