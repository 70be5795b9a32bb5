"""A phase: a model, its data and the middlewares that make something of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.nn import Module

from . import html
from .checks import whole_number
from .data.given import check_source, trusted_len
from .middleware.average import average
from .middleware.forward import forward
from .options import given, source_of
from .pipeline import Middleware, check, flatten, fresh, numbered
from .tracebacks import short

if TYPE_CHECKING:
    from .run import Run


@attrs.frozen(eq=False, kw_only=True, repr=False)
class Phase:
    """What `train` and `validate` make; ``phase | middleware`` is a new phase with one part more.

    Iterated by itself, it is a run of one pass: ``for state in phase``.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> val = lt.validate(model, [torch.ones(2, 1)] * 3, lambda model, batch: model(batch).mean())
        >>> [state.index for state in val], [state.index for state in val.limit(1)]
        ([0, 1, 2], [0])
    """

    name: str
    model: Any = attrs.field(repr=lambda model: type(model).__name__)
    source: Any = attrs.field(repr=lambda source: type(source).__name__)
    step: forward
    trains: bool
    middlewares: tuple[Middleware, ...] = ()
    device: str | torch.device | None = None
    non_blocking: bool = False
    max_batches: int | None = None

    def __or__(self, middleware: Middleware) -> Phase:
        check(middleware, f"{self.name} | middleware")
        return attrs.evolve(self, middlewares=(*self.middlewares, middleware))

    def __repr__(self) -> str:
        parts = " | ".join(name for name, _ in self.parts())
        source = source_of(self, trusted_len(self.source))
        return f"<Phase {self.name}: {type(self.model).__name__} on {source}: {parts}>"

    def _repr_html_(self) -> str:
        rows = [(name, given(part)) for name, part in self.parts()]
        return html.of_phase(self, source_of(self, trusted_len(self.source)), rows)

    def on(self, source: Any) -> Phase:
        """The same pipe on other data."""
        check_source(self.name, source)
        return attrs.evolve(self, source=source)

    def limit(self, batches: int) -> Phase:
        """The same pipe on at most *batches* batches a pass."""
        return attrs.evolve(self, max_batches=whole_number(f"{self.name}: limit", batches))

    def parts(self) -> list[tuple[str, Middleware]]:
        """New instances of its parts, with their names; `average` comes last unless it was piped on."""
        parts: list[tuple[str, Middleware]] = [
            ("forward", fresh(self.step)),
            *((name, fresh(p)) for name, p in flatten(self.middlewares)),
        ]
        if not any(isinstance(part, average) for _, part in parts):
            parts.append(("average", average()))
        names = numbered(name for name, _ in parts)
        return [(name, part) for name, (_, part) in zip(names, parts, strict=True)]

    def __iter__(self) -> Run:
        from .run import workflow  # the one import against the arrows: a phase alone is a run of one pass

        return workflow([(self, 1)], max_rounds=1)

    @short
    def to_end(self) -> dict[str, float]:
        """Run one pass, and return its means: ``val.to_end()["val/accuracy"]``."""
        return iter(self).to_end()


def _phase(
    kind: str, model: Any, source: Any, step: Callable[..., Any] | None, name: str, autocast: Any, options: Any
) -> Phase:
    trains = kind == "train"
    own = "train_step" if trains else "val_step"
    if step is None and not hasattr(model, own) and not hasattr(getattr(model, "module", None), own):
        raise TypeError(
            f"{kind}: give a step, a function step(model, batch) that returns the loss; "
            f"{type(model).__name__} has no {own}."
        )
    if isinstance(step, Module) and not isinstance(model, Module):
        raise TypeError(
            f"{kind}: the step is a {type(step).__name__}, a module. The order is {kind}(model, source, step)."
        )
    if not isinstance(name, str) or not name or "/" in name or "#" in name:
        raise ValueError(f"{kind}: name must be a word without / and #, got {name!r}.")
    check_source(kind, source)
    if options["device"] not in (None, "model"):
        torch.device(options["device"])  # raises where it is typed
    part = forward(step, autocast=autocast)
    return Phase(name=name, model=model, source=source, step=part, trains=trains, **options)


def train(
    model: Any,
    source: Any,
    step: Callable[..., Any] | None = None,
    *,
    name: str = "train",
    autocast: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
) -> Phase:
    """Make a training phase: batches, then the step with gradients on and the model in train mode.

    Args:
        model: Anything the step takes; an ``nn.Module`` is switched between train and eval mode.
        source: An iterable of batches, or a function without arguments that is called for each pass.
            No ``len`` is needed. Samplers with ``set_epoch`` are told the number of the pass.
        step: ``step(model, batch)`` -> the loss, or a mapping with ``"loss"``; see `forward`. Left out,
            the model's own ``train_step(batch, optimizer)`` is called.
        name: What the phase is called in states, results and logs.
        autocast: Dtype for ``torch.autocast`` around the step.
        device: Where batches are moved to; ``"model"`` for the device of the model's first parameter.
            None leaves them where they are.
        non_blocking: Do not wait for the copies (from pinned memory).

    Raises:
        TypeError: If *step* does not take (model, batch), or is missing and the model has no step of its own.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> batches = [torch.ones(4, 1), torch.zeros(4, 1)]
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for state in lt.train(model, batches, lambda model, batch: model(batch).pow(2).mean()) | lt.optimize(sgd):
        ...     print(state.iteration, state.updates, state.last)
        0 True False
        1 True True
    """
    options = {"device": device, "non_blocking": non_blocking}
    return _phase("train", model, source, step, name, autocast, options)


def validate(
    model: Any,
    source: Any,
    step: Callable[..., Any] | None = None,
    *,
    name: str = "val",
    autocast: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
) -> Phase:
    """Make a validation phase: batches, then the step under ``no_grad`` with the model in eval mode.

    Gradients are off within the step only; between two states your own code finds them as it left them.

    Args:
        model: As for `train`.
        source: As for `train`; every pass begins anew.
        step: As for `train`; left out, the model's own ``val_step(batch, optimizer)`` is called.
        name: As for `train`.
        autocast: As for `train`.
        device: As for `train`.
        non_blocking: As for `train`.

    Raises:
        TypeError: As for `train`.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> val = lt.validate(model, [torch.ones(4, 1)], lambda model, batch: {"mean": model(batch).mean()})
        >>> for state in val:
        ...     print(state.metrics["mean"].requires_grad, model.training, torch.is_grad_enabled())
        False False True
    """
    options = {"device": device, "non_blocking": non_blocking}
    return _phase("validate", model, source, step, name, autocast, options)
