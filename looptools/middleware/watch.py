"""Follow the sizes of weights and gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import Module

from ..intervals import Interval, interval
from ..means import read
from ..state import State

if TYPE_CHECKING:
    from ..run import Run


def _named(model: Any) -> dict[str, Tensor]:
    """The model's parameters; a part that is made anew of another one's options has them already."""
    if isinstance(model, Mapping):
        return dict(model)
    if not isinstance(model, Module):
        raise TypeError(f"watch: model must be a torch.nn.Module, got {model!r:.60}.")
    return dict(model.named_parameters())


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class watch:
    """Write the norm of every parameter and of its gradient into ``state.metrics``, every so often.

    The keys are ``"weight_norm/<name>"`` and ``"grad_norm/<name>"``, with the names of ``model.named_parameters()``;
    a parameter without a gradient has no ``grad_norm``. The norms stay on their device: nothing is read. They are on
    the states that are due alone, and averages over a pass are those of these states. In an accumulation window the
    iteration that closes it is taken.

    Stands behind ``backward``: before ``clip_grad_norm`` it sees the gradients as they come, behind
    it as they are applied; before ``update`` the weights that they belong to:
    ``train | lt.backward(optimizer) | lt.watch(model) | lt.update(optimizer)``.

    (The size of an update beside that of its weight would need a copy of the model, and is left out.)

    Args:
        model: Its parameters at this moment are watched: a whole model, or a part of one.
        every: Training iterations between two looks, an interval, or a predicate of the state.
        weights: Whether weights are watched.
        gradients: Whether gradients are watched.
        histograms: Also give all values, as ``"weights/<name>"`` and ``"gradients/<name>"``, to each part of the run
            that has a method ``histogram(tag, values)``, as ``log`` does. That reads the device. Tensors without a
            finite value are left out.

    Raises:
        ValueError: If it stands before backward, or nobody takes the histograms.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -2.0)
        >>> phase = lt.train(model, [torch.full((4, 1), 3.0)], lambda model, batch: model(batch).mean())
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> run = iter(phase | lt.backward(sgd) | lt.watch(model, every=1) | lt.update(sgd))
        >>> run.to_end()
        {'train/loss': -6.0, 'train/weight_norm/weight': 2.0, 'train/grad_norm/weight': 3.0}
    """

    model: Module | Mapping[str, Tensor] = attrs.field(
        converter=_named, repr=lambda named: f"<{len(named)} parameters>"
    )
    every: int | Interval = attrs.field(default=100, kw_only=True, converter=interval)
    weights: bool = attrs.field(default=True, kw_only=True, validator=attrs.validators.instance_of(bool))
    gradients: bool = attrs.field(default=True, kw_only=True, validator=attrs.validators.instance_of(bool))
    histograms: bool = attrs.field(default=False, kw_only=True, validator=attrs.validators.instance_of(bool))
    waits: bool = attrs.field(default=False, init=False, repr=False)  # due, until a window closes
    _seen: Callable[[], State | None] | None = attrs.field(default=None, init=False, repr=False)  # the state
    _given: set[str] = attrs.field(factory=set, init=False, repr=False)  # whose histograms of these tags are given
    only_looks: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        if not (self.weights or self.gradients):
            raise ValueError("watch: there is nothing to watch. To leave both out, drop this middleware.")

    def on_build(self, run: Run) -> None:
        """See that there is somebody for the histograms."""
        if self.histograms and not self._takers(run):
            raise ValueError(
                "watch: histograms=True, but no part of the run takes them. Pipe a log with a folder onto the run: "
                "lt.workflow(...) | lt.log(folder)."
            )

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        due: Any = self.every
        for state in states:
            if not state.dropped and (due(state) or (self.waits and state.trains)):
                self.waits = self.gradients and not state.updates and self._in_window(state)
                if not self.waits:
                    self._look(state)
            yield state

    def _look(self, state: State) -> None:
        shown: dict[str, Tensor] = {}
        parameters: Any = self.model
        for name, parameter in parameters.items():
            pairs = [("weight", parameter.detach())] if self.weights else []
            if self.gradients and parameter.grad is not None:
                pairs.append(("grad", parameter.grad.detach()))
            for kind, values in pairs:
                values = values.coalesce().values() if values.is_sparse else values
                state.metrics[f"{kind}_norm/{name}"] = _norm(values)
                shown[f"{'weights' if kind == 'weight' else 'gradients'}/{name}"] = values
        if self.histograms and not state.replayed:
            self._show(shown, state)

    def _show(self, shown: dict[str, Tensor], state: State) -> None:
        """Give the histograms; where one could not be written, the state comes again for the rest."""
        if self._seen is None or self._seen() is not state:
            self._seen, self._given = weakref.ref(state), set()
        finite = read({tag: values.isfinite().any() for tag, values in shown.items()})
        for tag in [tag for tag in shown if finite[tag] and tag not in self._given]:
            for part in self._takers(state.run):
                part.histogram(tag, shown[tag])
            self._given.add(tag)

    @staticmethod
    def _in_window(state: State) -> bool:
        """Whether a part of this pass says when the gradients are complete; a backward of one's own does not."""
        slots = state.run.cursor.line if state.run is not None and state.trains else []
        return any(hasattr(slot.part, "updates_in") for slot in slots)

    @staticmethod
    def _takers(run: Run | None) -> list[Any]:
        slots = run.cursor.run_slots if run is not None else []
        return [slot.part for slot in slots if hasattr(slot.part, "histogram")]


def _norm(values: Tensor) -> Tensor:
    """The Euclidean norm, of half precision in single: one above 65504 would be inf in fp16."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if half else None)
    return norm
