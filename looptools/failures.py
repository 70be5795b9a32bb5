"""What stopped a run, and what its exception says about that."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import Module

from .devices import model_device
from .links import Slot
from .redefined import redefined, warn_of_redefined
from .state import Progress, State
from .tracebacks import let_go

LIBRARY = __name__.partition(".")[0]


@attrs.frozen(eq=False)
class Failed:
    """What stopped a run: ``run.failed``.

    While the run stands there, the exception keeps what a debugger wants to see (``%debug``). Once it has gone on,
    nothing of the iteration is kept, whoever still has the exception or this.

    Args:
        part: Full name of the part that raised.
        state: The state it had; None if a pass's first batch could not be fetched, and once the run has gone on.
        exception: What it raised.
        verbs: The verbs that help in this place.
        line: The parts of the pass, to be looked at for what has been redefined since.

    Attributes:
        advice: What to do: the verbs that help, before them what has been redefined and is not in the run yet.

    Example:
        >>> Failed("train/forward", State(phase="train", iteration=3), ValueError("no"))
        Failed(part='train/forward', iteration=3, epoch=0, exception=ValueError('no'))
    """

    part: str
    state: State | None
    exception: BaseException
    verbs: str = ""
    line: Sequence[Slot] = attrs.field(default=(), repr=False)
    where: str = attrs.field(init=False)

    @where.default
    def _where(self) -> str:
        return "" if self.state is None else f", iteration={self.state.iteration}, epoch={self.state.epoch}"

    @property
    def redefined(self) -> str:
        """Which steps and parts of the pass have been redefined since they were piped, and how they get in."""
        return " ".join(f"{new.what} has been redefined since: {new.cure} puts it in." for new in redefined(self.line))

    @property
    def advice(self) -> str:
        """What to do."""
        return f"{self.redefined} {self.verbs}".strip()

    def __repr__(self) -> str:
        redefined = f" {self.redefined}" if self.redefined else ""
        return f"Failed(part={self.part!r}{self.where}, exception={self.exception!r}){redefined}"

    def warn_of_redefined(self) -> None:
        """As the run goes on: say, once for each, that what has been redefined is not what runs."""
        warn_of_redefined(self.line)

    def overcome(self, *, again: bool = False) -> None:
        """The run goes on, or is over: keep nothing of the iteration.

        Args:
            again: Whether what failed is done once more.
        """
        if again:
            self.warn_of_redefined()
        let_go(self.exception)
        object.__setattr__(self, "state", None)
        object.__setattr__(self, "line", ())


def stopped_by_user_code(name: str, error: BaseException) -> BaseException:
    """*error* itself, or another in its place if it would end the caller's ``for`` in silence."""
    if not isinstance(error, StopIteration):
        return error
    instead = RuntimeError(f"{name} raised StopIteration: something that it calls next() on is exhausted.")
    instead.__cause__ = error
    return instead


def not_the_state(name: str, out: Any) -> Exception:
    """The error of a part that handed on something else than the state it was given."""
    if not isinstance(out, State):
        return TypeError(f"{name} yielded {type(out).__name__}, not the state. Write `yield state`.")
    return RuntimeError(
        f"{name} must yield the state it was given last, once or not at all, but yielded another one. "
        "A part cannot hold states back or make new ones."
    )


def asked_by(actions: Sequence[Callable[..., Any]], slots: Iterable[Slot]) -> str:
    """Full name of the part that asked for the first of the *actions* that wait for the boundary."""
    part = getattr(actions[0], "__self__", None) if actions else None
    return next((slot.name for slot in slots if slot.part is part), "boundary")


def add_notes(
    failed: Failed,
    names: list[str],
    progress: Progress,
    slot: Slot | None,
    *,
    kept: bool = False,
    rolled_back: bool = False,
) -> None:
    """Say on the exception where it happened, what cannot be undone, and how to go on.

    Args:
        failed: What failed.
        names: Full names of the parts of the pass, in order.
        progress: The run's counters, for where no state is open.
        slot: The place of the part; None if it was none.
        kept: Whether a retry undoes all that the iteration has done.
        rolled_back: Whether all that the iteration has done is undone already, from a snapshot.
    """
    error, state, name = failed.exception, failed.state, failed.part
    number = f", part {names.index(name) + 1} of {len(names)}" if name in names else ""
    iteration, epoch = (state or progress).iteration, (state or progress).epoch
    _add(error, lambda: f"looptools: {name} (iteration {iteration}, epoch {epoch}{number}).")
    _add(error, lambda: advise(failed))
    if rolled_back:
        _add(error, lambda: "It was rolled back to where the iteration had only its batch.")
    elif slot is not None and state is not None:
        _add(error, lambda: left_behind(slot, state))
        if not kept:
            _add(error, lambda: left_by_redoing(slot, state))
    code = getattr(slot.part, "__code__", None) if slot is not None else None
    if slot is not None and code is not None and inspect.isgeneratorfunction(slot.part) and code.co_nlocals > 2:
        _add(error, lambda: f"{slot.name} is a plain generator: it begins anew, without what local variables kept.")
    _add(error, lambda: failed.verbs if isinstance(error, Exception) else "next(run) goes on.")


def _add(error: BaseException, note: Callable[[], str]) -> None:
    """Add a note, if there is one; what cannot be described, or takes no notes, must not hide what was raised."""
    with contextlib.suppress(Exception):
        if said := note():
            error.add_note(said)


def left_behind(slot: Slot, state: State) -> str:
    """What a failure in the middle of the part cannot undo without snapshots, as far as that can be known."""
    part = slot.part
    if hasattr(part, "leaves"):
        done = part.leaves(state)
        return f"What it did before it failed cannot be undone: {done}." if done else ""
    kind = part if inspect.isroutine(part) else type(part)
    if f"{getattr(kind, '__module__', '')}.".startswith(f"{LIBRARY}."):
        return ""
    return f"{slot.name} is your own: what it had changed before it failed stays changed, and would be done again."


def left_by_redoing(slot: Slot, state: State) -> str:
    """What changes a second time when a part behind `forward` fails, and the step is called again."""
    again = getattr(slot.part, "redo_from", "") == "forward"
    if state.forwarded is None or (state.committed and not again) or not state.forwarded.leaves(state):
        return ""
    verbs = "next(run) and run.retry() call" if again else "run.retry() calls"
    return f"{verbs} the step again: the model's buffers (BatchNorm statistics) then take this batch in twice."


def what_now(name: str, state: State | None, within_part: bool, kept: bool = False) -> str:
    """The verbs that help after a failure of the part *name*, or of what it asked to be done at the boundary.

    Args:
        name: Full name of the part.
        state: The open iteration's.
        within_part: Whether the part itself raised.
        kept: Whether the iteration's beginning is kept.
    """
    if name.startswith("workflow/"):
        return "next(run) calls it again, run.skip() goes on behind it."
    if name.endswith("/batches"):
        return "next(run) asks the source again, run.skip() passes over the batch."
    if not within_part:  # the iteration is complete, but for what was to be done at its boundary
        return "run.replace(...) mends the part, next(run) does it again, run.skip() leaves it undone."
    redo = "" if state is None or (state.committed and not kept) else "run.retry() redoes the iteration, "
    return f"run.replace(...) mends it, next(run) goes on there, {redo}run.skip() drops it."


# What to do about the commonest errors of torch, which do not say it themselves


@attrs.frozen(eq=False)
class Advice:
    """What to say about one kind of error.

    Args:
        kind: Its type, or types.
        message: A pattern that is found in its message.
        text: What to do; ``{batch}``, ``{model}`` and ``{memory}`` are filled in.
        of: Short name of the parts that it is said of; empty for all.
    """

    kind: type[Exception] | tuple[type[Exception], ...]
    message: str
    text: str
    of: str = ""


LESS_MEMORY = (
    "The batch: {batch}.{memory} To need less: smaller batches with lt.optimize(..., accumulate=n); "
    "autocast=torch.bfloat16; torch.utils.checkpoint in the model; if update failed, foreach=False in the optimizer. "
    "What the step had made is let go, so run.retry() works once there is room."
)
DEVICES = (
    'The model: {model}. The batch: {batch}. lt.train(..., device="model") moves batches to the model; what the step '
    "makes itself needs device=."
)
DTYPES = (
    "The model: {model}. The batch: {batch}. NumPy's numbers become float64: x.float(). Labels of classes must be "
    "int64: y.long(); targets of mse_loss and binary_cross_entropy float: y.float()."
)
NO_GRAPH = (
    "The loss was cut off from the weights: by .detach(), .item(), .data, torch.tensor(loss), argmax, torch.no_grad(), "
    "or all weights are frozen. A validation step has no gradients at all. If the step calls backward itself, leave "
    "that to lt.optimize(optimizer)."
)
GRAPH_IS_GONE = (
    "Does the step call backward itself? Leave that to lt.optimize(optimizer). Do two parts go back over one loss? Put "
    "lt.forward(step) between them, or give both optimizers one backward: lt.optimize([first, second]). Is something "
    "kept from batch to batch, as an RNN's state? Detach it: hidden.detach()."
)
WRITTEN_OVER = (
    "Something that backward needs was written over: by an update since the forward (put lt.forward(step) behind it), "
    "or in the step (x += 1, relu_(), .mul_()). torch.autograd.set_detect_anomaly(True) shows where."
)
OUT_OF_RANGE = "Class labels must be 0 ... classes - 1, and token numbers 0 ... size of the vocabulary - 1."
DEVICE_IS_LOST = (
    f"Most often an index is out of range. {OUT_OF_RANGE} This process cannot use the device any more: start it anew, "
    "with CUDA_LAUNCH_BLOCKING=1 or on the CPU to see the line; run.resume() goes on from the newest checkpoint."
)
ONE_SAMPLE = "BatchNorm cannot train on one sample, such as a last batch: DataLoader(..., drop_last=True)."

OUT_OF_MEMORY = (
    Advice((torch.OutOfMemoryError, MemoryError), "", LESS_MEMORY),
    Advice(RuntimeError, "DefaultCPUAllocator: can't allocate|out of memory", LESS_MEMORY),
)
ADVICE = (  # the first that fits is given
    *OUT_OF_MEMORY,
    Advice(RuntimeError, "device-side assert", DEVICE_IS_LOST),
    Advice(
        RuntimeError,
        "on the same device|not at the same device|on the expected device|"
        r"Input type \(torch\.[a-z]+\.\w+\) and weight type \(torch\.[A-Z]|"
        r"Input type \(torch\.[A-Z]\w+\) and weight type \(torch\.[a-z]",
        DEVICES,
    ),
    Advice(
        (RuntimeError, ValueError),
        "scalar type|[Dd]type|not implemented for '|can't be cast to|Input type .* should be the same",
        DTYPES,
    ),
    Advice(RuntimeError, "element 0 of tensors does not require grad", NO_GRAPH),
    Advice(RuntimeError, "through the graph a second time", GRAPH_IS_GONE),
    Advice(RuntimeError, "modified by an inplace operation", WRITTEN_OVER),
    Advice(IndexError, "Target .* is out of bounds|index out of range in self", OUT_OF_RANGE),
    Advice(ValueError, "Expected more than 1 value per channel", ONE_SAMPLE),
    Advice(RuntimeError, "shape|size of tensor|channels", "The batch: {batch}.", of="forward"),
    Advice(
        (KeyError, IndexError, ValueError, TypeError, AttributeError),
        "^(?!forward:)",
        "The batch: {batch}.",
        of="forward",
    ),
)


def advise(failed: Failed) -> str:
    """What to do about the error, if it is one of those that are known; empty otherwise.

    Where memory ran out, the traceback's frames let go of their tensors.
    """
    error, state = failed.exception, failed.state
    part = failed.part.rpartition("/")[2].rpartition(".")[2].partition("#")[0]
    for advice in ADVICE:
        if isinstance(error, advice.kind) and advice.of in ("", part) and re.search(advice.message, str(error)):
            if advice in OUT_OF_MEMORY:
                let_go(error)
            return advice.text.format_map(_facts(state))
    return ""


def _facts(state: State | None) -> dict[str, str]:
    if state is None:
        return {"batch": "not there yet", "model": "see its parameters", "memory": ""}
    device, parameter = model_device(state.model), None
    if isinstance(state.model, Module):
        parameter = next(state.model.parameters(), None)
    model = type(state.model).__name__ + ("" if parameter is None else f", {_tensor(parameter, '')}")
    memory = ""
    if device is not None and device.type == "cuda":
        peak, all_of_it = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        memory = f" At most {peak / 2**30:.1f} of {all_of_it / 2**30:.1f} GiB on {device} were in use."
    return {"batch": contents(state.batch), "model": model, "memory": memory}


def contents(batch: Any, depth: int = 3) -> str:
    """What a batch holds, in few words.

    Example:
        >>> contents({"image": torch.zeros(4, 3), "label": [1, 2]})
        'dict of image: (4, 3) float32 on cpu, label: list of int, int'
    """
    if isinstance(batch, Tensor):
        return _tensor(batch, "nested " if batch.is_nested else f"{tuple(batch.shape)} ")
    kind = type(batch).__name__
    if isinstance(getattr(batch, "shape", None), tuple) and hasattr(batch, "dtype"):
        return f"{kind} {batch.shape} {batch.dtype}"
    if not isinstance(batch, Mapping | tuple | list):
        return kind
    held = []
    for item in itertools.islice(batch.items() if isinstance(batch, Mapping) else batch, 5 if depth else 0):
        key, value = item if isinstance(batch, Mapping) else ("", item)
        held.append((f"{key}: " if key != "" else "") + contents(value, depth - 1))
    held += ["..."] if depth and len(batch) > 5 else []
    return f"{kind} of {', '.join(held) or 'nothing'}" if depth else kind


def _tensor(tensor: Tensor, shape: str) -> str:
    return f"{shape}{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
