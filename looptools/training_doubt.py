"""Whether anybody trains: asked once a run is under way, of phases whose pipe does not show it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import attrs
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import Parameter, is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from .cursor import Cursor
from .means import read
from .order import FILL, MOVE, OWN, Line, lines, weights, weights_of
from .phases import Phase
from .state import State
from .warn import warn

PATIENCE = 32  # iterations without a gradient; losses may be summed up for one backward
SAMPLED = 32  # parameters, and values of each, that are compared before anything is said


def training_doubt(cursor: Cursor) -> Doubt | None:
    """What has to be asked once the run is under way: whether anybody trains. None where the pipe shows it."""
    if not all(isinstance(entry.phase, Phase) for entry in cursor.passes.agenda.entries):
        return None  # a plain function between passes may do it
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

    The step or the body of the user's own loop may, every so many iterations. So it waits, to the end of the pass at
    most, and looks for gradients, for weights that were written to, and for an optimizer that stepped: a fused one
    writes unseen. Before it warns it compares some of the weights, which reads the device, once.

    Args:
        cursor: The run's machine; it calls this before each iteration, as long as it is in question.
        lines: The phases in question.
    """

    def __init__(self, cursor: Cursor, lines: Iterable[Line]) -> None:
        self.cursor = cursor
        self.lines = {line.name: line for line in lines}
        self.before: dict[str, tuple[Marks | None, list[Tensor]]] = {}
        self.trained: set[str] = set()  # phases whose weights have been seen to move
        self.stepped = False
        doubt = weakref.ref(self)

        def note(*_: object) -> None:
            if (it := doubt()) is not None:
                it.stepped = True

        self.settle = weakref.finalize(self, register_optimizer_step_post_hook(note).remove)

    def __call__(self) -> None:
        try:
            said = self._ask()
        except Exception:  # tensors come in many kinds, and a question must not stop a training
            said = ""
            self._settle(*self.lines)
        if said:
            warn(said)

    def _ask(self) -> str:
        state, said = self.cursor.handed, ""
        if state is not None and state.phase in self.before and state.phase in self.lines:
            said = self._judge(self.lines[state.phase], state)
        if self.cursor.passes.phase is None:  # the pass that begins may be one of theirs
            models = {name: line.phase.model for name, line in self.lines.items()}
            self.before = {name: (_marks(model), _sample(model)) for name, model in models.items()}
            self.stepped = False
        return said

    def _judge(self, line: Line, state: State) -> str:
        """What to say of a phase; empty if it trains, or as long as it may."""
        (before, sample), now = self.before[line.name], _marks(line.phase.model)
        if before is None or now is None:
            return ""  # it cannot be told in this pass
        moves = self.stepped or now.weights != before.weights
        filled = now.gradients != before.gradients
        if not moves and not state.last and (filled or state.index + 1 < PATIENCE):
            return ""  # backward or update may be still to come
        self._settle(line.name)
        renewed = now.buffers != before.buffers
        if moves:
            self.trained.add(line.name)
        elif _could_train(line, state) and not (renewed and self._trained_elsewhere(line)):
            return _nothing_moves(line, filled, renewed) if _equal(sample, _sample(line.phase.model)) else ""
        return ""

    def _settle(self, *names: str) -> None:
        for name in names:
            del self.lines[name]
        if not self.lines:
            self.cursor.unsure = None
            self.settle()

    def _trained_elsewhere(self, line: Line) -> bool:
        """Whether another phase trains the model, so that this one may be there for its buffers alone."""
        others = [other for other in line.run if weights_of(other) & weights_of(line)]
        return any(weights(slot) & weights_of(line) for other in others for slot in other.of(MOVE)) or any(
            other.name in self.trained for other in others
        )


def _could_train(line: Line, state: State) -> bool:
    trainable = any(p.requires_grad for p in line.phase.model.parameters())
    return trainable and state.loss is not None and state.loss.requires_grad


@attrs.frozen
class Marks:
    """How often a model's tensors have been written to, read on the host; ``p.data`` is written to unseen."""

    weights: list[int]
    gradients: list[tuple[int, int] | None]
    buffers: list[int]


def _marks(model: Module) -> Marks | None:
    """Those of *model* as it is now; None if it does not tell, as a lazy one does not."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    if any(map(is_lazy, [*parameters, *buffers])):
        return None
    gradients = [None if p.grad is None else (id(p.grad), _version(p.grad)) for p in parameters]
    return Marks([_version(p) for p in parameters], gradients, [_version(b) for b in buffers])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(model: Module) -> list[Tensor]:
    """Copies of some values of some weights, all over the model."""
    plain = [p.detach() for p in model.parameters() if type(p) is Parameter and not is_lazy(p) and p.numel()]
    chosen = [p.reshape(-1) for p in plain[:: -(-len(plain) // SAMPLED) or 1]]
    return [p[:: -(-len(p) // SAMPLED)].clone() for p in chosen]


def _equal(then: list[Tensor], now: list[Tensor]) -> bool:
    """Whether no value has changed; waits for the device."""
    if [(t.shape, t.device) for t in then] != [(t.shape, t.device) for t in now]:
        return False
    changed = {str(n): (old != new).any() for n, (old, new) in enumerate(zip(then, now, strict=True))}
    return not any(read(changed).values())


def _nothing_moves(line: Line, filled: bool, renewed: bool) -> str:
    if not filled:
        buffers = " If it is only to renew BatchNorm, compute the loss under torch.no_grad()." if renewed else ""
        return (
            f"{line.name}: nobody calls backward, so nothing is trained, as far as can be seen. "
            f"Pipe lt.optimize(optimizer) on.{buffers}"
        )
    if line.of(MOVE):
        return (
            f"{line.name}: no weight has moved, since update waits for backward to say when. Leave backward out of the "
            "step, and pipe lt.optimize(optimizer) on."
        )
    return (
        f"{line.name}: as far as can be seen, there are gradients, but no weight has moved. Pipe lt.update(optimizer) "
        "on behind backward, or lt.optimize(optimizer) in place of both."
    )
