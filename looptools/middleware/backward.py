"""Fill the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

import attrs
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..checks import whole
from ..gradients import Gradients, fill_windows, one_or_several, parameters_of, require_optimizers
from ..pipeline import name_of
from ..scaling import forget_dropped, prepare, unscale
from ..state import State
from ..warn import warn
from ..weighing import Weigh, is_weigh, weight_of
from .update import update

if TYPE_CHECKING:
    from ..run import Run


def refuse(part: str, state: State) -> None:
    """Say why the loss of *state* cannot be differentiated."""
    where = f"iteration {state.iteration} of {state.phase}"
    if state.loss is None:
        keys = ", ".join(map(str, state.outputs or {})) or "nothing"
        raise TypeError(f'{part}: the step of {where} gave no loss, but {keys}. Return it, or a mapping with "loss".')
    kind = "" if state.trains else " A validation phase has none; leave optimize out of it."
    raise RuntimeError(f"{part}: the loss of {where} has no graph. Was it detached, or computed under no_grad()?{kind}")


def _kinds(given: Any) -> str:
    names = [type(optimizer).__name__ for optimizer in (given if isinstance(given, tuple) else (given,))]
    return f"[{', '.join(names)}]" if isinstance(given, tuple) else names[0]


def _waits(first: backward, parts: list[Any], second: backward) -> bool:
    """Whether an update of the *first* one's optimizers comes only behind the *second*."""
    numbers = {id(part): number for number, part in enumerate(parts)}
    behind = parts[numbers[id(second)] :]
    movers = [part for part in behind if isinstance(part, update) and part.optimizer in first.optimizers]
    return numbers[id(first)] < numbers[id(second)] and bool(movers)


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class backward:
    """Call ``backward`` on the loss, over windows of *accumulate* iterations.

    The gradients of the optimizer's parameters are zeroed when a window opens, just before backward, so that
    they can be looked at after the update. Sets ``state.updates`` where a window closes. The gradient of a window is
    the mean of its iterations' gradients, weighted by *weigh*; one whose weights are all 0 leaves zeros.

    A window ends with its pass and may be short then; with *across_epochs* it goes on in the next pass, and only the
    last one of the run may be short (mmcv's way). By batches, each loss is divided by the number of iterations in its
    window. Where that proves wrong (a source without a length, a skipped batch, ``run.extend``), the gradients are
    scaled when the window closes. Gradients of an open window are saved in checkpoints.

    If the last state of a pass is dropped before it comes here, an open window makes no update, which is said; with
    *across_epochs* it waits for the next pass, and makes none if no other comes.

    Several optimizers that go down one loss (one for matrices, one for the rest) share a backward, its window and its
    scaler; each has an ``update`` behind it.

    In a pipe with several backwards (a GAN's) of which another one accumulates, or still waits for its update,
    gradients go to the parameters of this one's optimizers alone: one loss does not leak into the other's gradients.

    Args:
        optimizer: Its gradients are zeroed; a list of optimizers that go down the same loss, no two of which hold the
            same parameter.
        accumulate: Iterations whose gradients make one update.
        across_epochs: Whether windows go on across the ends of passes.
        weigh: What an iteration counts in its window: ``"batches"``, the same each; ``"samples"``,
            ``state.num_samples``; or a function of the state that gives a number or a tensor of shape ``()``, which
            stays on its device (tokens). Losses are multiplied by it, gradients divided by the sum at the end.
        scaler: ``torch.amp.GradScaler`` for fp16; gradients are unscaled where a window closes.

    Raises:
        TypeError: If the step gave no loss.
        RuntimeError: If the loss has no graph.
        ValueError: If only one of backward and update has the scaler, when the run is built.
        ValueError: If two optimizers hold the same parameter.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor(3.0))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> state = next(backward(sgd)([State(phase="train", loss=2 * weight)]))
        >>> weight.grad, state.updates
        (tensor(2.), True)
    """

    optimizer: Optimizer | Sequence[Optimizer] = attrs.field(converter=one_or_several, repr=_kinds)
    accumulate: int = attrs.field(default=1, kw_only=True, validator=whole())
    across_epochs: bool = attrs.field(default=False, kw_only=True, validator=attrs.validators.instance_of(bool))
    weigh: Weigh = attrs.field(
        default="batches",
        kw_only=True,
        validator=is_weigh,
        repr=lambda w: repr(w) if isinstance(w, str) else name_of(w),
    )
    scaler: GradScaler | None = attrs.field(
        default=None, kw_only=True, repr=lambda s: "None" if s is None else "GradScaler"
    )
    filled: int = attrs.field(default=0, init=False, repr=False)  # iterations in the open window
    share: int = attrs.field(default=1, init=False, repr=False)  # what their losses are divided by,
    total: Any = attrs.field(default=0, init=False, repr=False)  # or the sum of what they were multiplied by
    _gradients: Gradients = attrs.field(init=False, repr=False)  # of all its optimizers; aside until it goes on
    _after: int | None = attrs.field(default=None, init=False, repr=False)  # iterations here after the pass under way
    _asked: bool = attrs.field(default=False, init=False, repr=False)  # whether that is up to date
    _only: bool = attrs.field(default=False, init=False, repr=False)  # no gradients for other optimizers' parameters
    _run: Any = attrs.field(default=None, init=False, repr=False)  # a weak reference
    _told: bool = attrs.field(default=False, init=False, repr=False)  # that a window stays open
    redo_from: ClassVar[str] = "forward"  # after a failure here the graph may be gone

    def __attrs_post_init__(self) -> None:
        self._gradients = Gradients(require_optimizers("backward", self.optimizer))

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those whose gradients it fills, one or several."""
        return self._gradients.optimizers

    def on_build(self, run: Run) -> None:
        """Look at the other optimizers of the same pipe; also called when the run is extended."""
        self._asked, self._run = False, ref(run)
        for line in run.cursor.lines.values():
            parts = [slot.part for slot in line]
            if any(part is self for part in parts):
                others = [p for p in parts if isinstance(p, backward) and not set(p.optimizers) <= set(self.optimizers)]
                self._only = any(other.accumulate > 1 or _waits(other, parts, self) for other in others)
                if self.accumulate > 1 and self.scaler and any(other.scaler is self.scaler for other in others):
                    raise ValueError(
                        f"backward: a GradScaler that several backwards share changes its scale while a window of "
                        f"accumulate={self.accumulate} is open. Give each its own."
                    )

    def on_pass(self, run: Run) -> None:
        """A new pass opens a new window, or goes on with the one that is open."""
        self._asked = self._told = False
        for slot in run.cursor.slots:
            if isinstance(slot.part, backward) and slot.part is not self:
                slot.part._lay_aside()
        if self.across_epochs:
            return
        filled, self.filled = self.filled, 0
        if filled:
            warn(
                f"backward: the gradients of the last {filled} batches made no update: the last state of their pass "
                "was dropped before it came here."
            )

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        gradients = self._gradients
        for state in states:
            loss: Any = state.loss
            if loss is None or not loss.requires_grad:
                refuse("backward", state)
            if state.first and not self.across_epochs:  # in a pipe without a run; there, on_pass does it
                self.filled = 0
            closes = self.filled + 1 >= self.accumulate or (  # may fetch a batch: before gradients change
                self._is_final(state) if self.across_epochs else state.last
            )
            if gradients.aside is not None:
                gradients.put_back()
            if not self.filled:
                if self.scaler is not None:
                    prepare(self.scaler, gradients.optimizers)
                for optimizer in gradients.optimizers:
                    optimizer.zero_grad()
                self.share = 1 if self.accumulate == 1 else self._share(state)
                self.total = 0
            weight: Any = 0
            if self.weigh != "batches":
                weight = weight_of(state, self.weigh)
                loss = loss * weight
            elif self.share != 1:
                loss = loss / self.share
            if self.scaler is not None:
                loss = self.scaler.scale(loss)
            if self._only:
                loss.backward(inputs=[p for p in parameters_of(gradients.optimizers) if p.requires_grad])
            else:
                loss.backward()
            self.filled += 1
            self.total += weight
            fill_windows(state, gradients.optimizers, closes)
            if closes:
                if self.scaler is not None:
                    unscale(self.scaler, gradients.optimizers, state)
                if self.filled != self.share or self.weigh != "batches":
                    self._even_out(gradients.present())
                self.filled = 0
            if self.accumulate > 1:
                state.committed = "its gradients are in the accumulation window already"
            elif self.scaler is not None:
                state.committed = "its gradients are unscaled already"
            yield state
            if closes and self.scaler is not None:
                forget_dropped(self.scaler, state)

    def close(self) -> None:
        """At the end of the run, say what an open window has gathered for nothing."""
        run = self._run() if self._run is not None else None
        if run is not None and run.ended and self.across_epochs and self.filled and not self._told:
            self._told = True
            warn(
                f"backward: the run ended ({run.ended}) in an open window: the gradients of the last {self.filled} "
                "batches made no update. run.extend(...) goes on with them."
            )

    def updates_in(self, passes: Sequence[int]) -> int:
        """Windows that close in passes of so many iterations."""
        return sum(-(-length // self.accumulate) for length in ([sum(passes)] if self.across_epochs else passes))

    def drop_window(self) -> None:
        """Give up what the open window has gathered; the next batch opens a new one."""
        self.filled = 0

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        return "part of this batch's gradients may be in the open window already" if self.filled else ""

    # How long a window is

    def _share(self, state: State) -> int:
        """How many iterations the window that *state* opens will have, as far as that can be known."""
        plan = state.plan
        known = [self.accumulate]
        if plan is not None and plan.max_iterations is not None:
            known.append(plan.max_iterations - state.iteration)
        if plan is not None and plan.length is not None:
            after = self._iterations_after(state) if self.across_epochs else 0
            known.append(self.accumulate if after is None else plan.length - state.index + after)
        return min(known)

    def _is_final(self, state: State) -> bool:
        """Whether no other iteration of the run comes here."""
        plan = state.plan
        if plan is not None and plan.max_iterations is not None and state.iteration + 1 >= plan.max_iterations:
            return True
        return self._iterations_after(state) == 0 and state.last

    def _iterations_after(self, state: State) -> int | None:
        if not self._asked:
            self._after = None if state.run is None else state.run.batches_after(self)
            self._asked = True
        return self._after

    # What is in the window

    def _even_out(self, gradients: list[Tensor]) -> None:
        """Before the update: take out the weights, and make up for a window cut short."""
        if self.weigh == "batches":
            for gradient in gradients:
                gradient.mul_(self.share / self.filled)
        elif isinstance(self.total, Tensor):
            total = self.total.masked_fill(self.total == 0, 1)  # the gradients are 0 then
            for gradient in gradients:
                gradient.div_(total.to(gradient.device))
        elif self.total:
            for gradient in gradients:
                gradient.div_(self.total)

    def _lay_aside(self) -> None:
        """Somebody else may zero the gradients now; those of an open window wait."""
        if self.filled:
            self._gradients.lay_aside()

    def state_dict(self) -> dict[str, Any]:
        """The open window, with the gradients in it."""
        window = {"filled": self.filled, "share": self.share, "total": self.total}
        return {**window, "gradients": list(self._gradients.all()) if self.filled else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the window that `state_dict` gave. Gradients are put on their parameters at the next state."""
        self.filled, self.share, self.total = state["filled"], state["share"], state.get("total", 0)
        self._gradients.aside = list(state["gradients"]) if self.filled else None

    def carry_over(self, old: backward) -> None:
        """Go on with the window of a part that is replaced by this one.

        Raises:
            RuntimeError: If what is in it was weighed or scaled in another way.
        """
        self._only = old._only
        if set(old.optimizers) != set(self.optimizers):
            return
        by_batches = [part.weigh == "batches" for part in (old, self)]
        if old.filled and (by_batches[0] is not by_batches[1] or old.scaler is not self.scaler):
            raise RuntimeError(
                f"replace: {old.filled} iterations are in the open window of backward, weighed or scaled in another "
                "way than the new one would. Replace it after an iteration with state.updates."
            )
        self.filled, self.share, self.total = old.filled, old.share, old.total
        self._gradients.take_over(old._gradients)
