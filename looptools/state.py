"""What travels through a pipe (`State`), and what it refers to (`Plan`, `Progress`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor
from torch.optim import Optimizer

from . import html

if TYPE_CHECKING:
    from .run import Run


@attrs.frozen(kw_only=True)
class Plan:
    """The horizon of one pass: what can be said before its first batch.

    Args:
        phase: Name of the phase.
        trains: Whether its iterations count as training.
        round: Walks through the whole workflow completed before this pass.
        length: Iterations of this pass; None if the source does not say.
        max_epochs: Training passes after which the run ends; None if unbounded.
        max_iterations: Training iterations after which it ends; None if unbounded.
        epochs: Training passes of the whole run; None if that cannot be known.
        iterations: Training iterations of the whole run; None if that cannot be known.

    Example:
        >>> Plan(phase="train", trains=True, length=23, max_epochs=2, epochs=2, iterations=46).iterations
        46
    """

    phase: str
    trains: bool
    round: int = 0
    length: int | None = None
    max_epochs: int | None = None
    max_iterations: int | None = None
    epochs: int | None = None
    iterations: int | None = None


@attrs.define(eq=False, kw_only=True)
class Progress:
    """What a run has done so far; every number counts completed things.

    Args:
        epoch: Completed training passes.
        iteration: Completed training iterations.
        round: Completed walks through the workflow.
        samples: Samples of the completed training iterations.
        seconds: Seconds that the run was at work, its user's own code not included.
        updates: Moves of each optimizer.

    Example:
        >>> Progress(epoch=3, iteration=69).epoch
        3
    """

    epoch: int = 0
    iteration: int = 0
    round: int = 0
    samples: int = 0
    seconds: float = 0.0
    updates: dict[Optimizer, int] = attrs.field(factory=dict, repr=lambda updates: str(list(updates.values())))


@attrs.define(eq=False, kw_only=True)
class State:
    """One iteration: the facts about it, and what the parts of the pipe make of it.

    A run makes a fresh one for each batch. Tensors stay on the device where they were
    made; its repr shows loss and metrics, which waits for them. All counters start at 0.

    Args:
        phase: Name of the phase.
        trains: Whether it is a training phase.
        epoch: Training passes before this one; in validation, the last training pass.
        index: Batches of this pass before this one.
        iteration: Training iterations before this one; in validation, the last one.
        first: Whether it opens its pass.
        last: Whether it ends its pass. If that cannot be known from the source's length, reading
            it fetches one batch ahead.
        round_last: Whether it ends a walk through the whole workflow.
        model: The phase's model.
        batch: What the source gave, moved to the device that was asked for.
        outputs: What the step returned, as a mapping.
        loss: The step's loss, a tensor of one element that carries the graph.
        num_samples: Samples in the batch: the weight of this iteration in averages.
        metrics: The step's scalars, detached; parts may add to them. They are averaged over the pass.
        gauges: Scalars that stand for themselves (a rate, a peak, a metric over the whole pass): not averaged; a log
            row shows the newest, ``run.results`` those of the pass's last state.
        lr: Learning rate of the first param group, in force at this iteration's update.
        grad_norm: Norm of the gradients before clipping, a tensor of shape ``()``.
        updates: Whether an optimizer moves in this iteration.
        windows: How far each optimizer's accumulation window is, for the parts behind its backward.
        dropped: Set by the run on a state that a part did not yield, or that ``run.skip()`` dropped; averages leave it
            out. To drop a state, do not yield it.
        replayed: Whether it is computed a second time only to get back somewhere; parts that write files keep still.
        committed: Why the iteration cannot be redone from its batch any more; empty while it can.
        forwarded: The `forward` that made outputs and loss.
        plan: The horizon of the pass.
        run: The run that hands it out; None in a pipe over hand-made states.

    Example:
        >>> state = State(phase="train", iteration=12)
        >>> state.metrics["loss"] = 0.5
        >>> state
        State(phase='train', epoch=0, index=0, iteration=12, loss=None, metrics={'loss': 0.5}, lr=None, updates=False)
    """

    phase: str
    trains: bool = attrs.field(default=True, repr=False)
    epoch: int = 0
    index: int = 0
    iteration: int = 0
    first: bool = attrs.field(default=False, repr=False)
    last: bool = attrs.field(default=False, repr=False)
    round_last: bool = attrs.field(default=False, repr=False)
    model: Any = attrs.field(default=None, repr=False)
    batch: Any = attrs.field(default=None, repr=False)
    outputs: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    loss: Tensor | None = None
    num_samples: int = attrs.field(default=1, repr=False)
    metrics: dict[str, Any] = attrs.field(factory=dict)
    gauges: dict[str, Any] = attrs.field(factory=dict, repr=False)
    lr: float | None = attrs.field(default=None, repr=lambda lr: f"{lr:g}" if isinstance(lr, float) else repr(lr))
    grad_norm: Tensor | None = attrs.field(default=None, repr=False)
    updates: bool = False
    windows: dict[Optimizer, str] = attrs.field(factory=dict, repr=False)
    dropped: bool = attrs.field(default=False, repr=False)
    replayed: bool = attrs.field(default=False, repr=False)
    committed: str = attrs.field(default="", repr=False)
    forwarded: Any = attrs.field(default=None, repr=False)
    plan: Plan | None = attrs.field(default=None, repr=False)
    run: Run | None = attrs.field(default=None, repr=False)

    def __getattr__(self, name: str) -> bool:
        # Only called for a field that is not set: the cursor deletes `last` and `round_last` where they are not
        # known yet. A property would cost a Python call at each of the many places that read them.
        if name not in ("last", "round_last") or self.run is None:
            raise AttributeError(f"State has no {name!r} ({self.phase}, iteration {self.iteration}).")
        value = self.run.is_last(self) if name == "last" else self.last and self.run.is_round_last(self)
        setattr(self, name, value)
        return value

    def _repr_html_(self) -> str:
        return html.of_state(self)

    def stop(self, why: str) -> None:
        """End the run after this iteration; *why* is shown in ``run.ended``.

        Raises:
            RuntimeError: If the state belongs to no run.
        """
        if self.run is None:
            raise RuntimeError("stop: this state belongs to no run. Leave your own loop with break.")
        self.run.stop(why)
