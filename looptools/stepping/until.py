"""Watchpoints: go on until a state is what one waits for."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from ..checks import whole_number
from ..cursor import Cursor
from ..failures import stopped_by_user_code
from ..gradients import optimizers_in, parameters_of
from ..means import number, read
from ..middleware.backward import backward
from ..state import State
from ..warn import warn
from .names import find_one, matches
from .stages import comes_next, hear, in_front_of, require_part

Check = Callable[[State], bool]

MAY_BE_NONE = frozenset(field.name for field in attrs.fields(State) if field.default is None)
_left: WeakKeyDictionary[State, str] = WeakKeyDictionary()  # states that were found, and in front of which part


def until(cursor: Cursor, when: Any, *, epoch: Any, iteration: Any, before: str | None) -> State:
    """Go on until a state is what one waits for: *when* is true of it, or it is the first of *epoch* or *iteration*.

    Every state is asked once, that of an iteration which is open already too. What raises because a field of the state
    is None counts as not yet; whatever else *when* raises comes out, and the run stands as it stood. With *before*, a
    state that *when* has found there, and that stands there still, is not asked again. If a part drops the very
    *iteration*, the first one behind it counts.

    Args:
        cursor: Where the run stands.
        when: A function of the state; what it returns is taken as true or false.
        epoch: Number of a training pass, from 0.
        iteration: Number of a training iteration, from 0.
        before: The part to stop in front of. A state that a part behind it has asked for, since it dropped the one
            before, is past that place when it can be seen, and is not asked.

    Raises:
        LookupError: If the run ends first, or there is no such part.
        ValueError: If not exactly one of *when*, *epoch* and *iteration* is given, or it is behind already.
        TypeError: If *when* is not a function of one argument, or gives a tensor of several elements.
    """
    _require_one(when, epoch, iteration, before)
    if before is not None:
        require_part(cursor, before, "until")
    if when is None:
        check = _of_number(cursor, epoch, iteration, before)
        wanted = f"epoch {epoch}" if iteration is None else f"iteration {iteration}"
        return _go_on(cursor, "until", check, before, f"before {wanted} came", again=True)
    asked = _Asked(when)
    return _go_on(cursor, "until", asked, before, "before that was true of a state", asked.so_far)


def until_nonfinite(cursor: Cursor, *, before: str | None) -> State:
    """Go on until something of a state is nan or infinite.

    That is its loss, a metric or its gradient norm; in a training iteration the gradients, if a backward has filled
    them by then and no GradScaler looks after them, and once it is complete the weights. `nonfinite` says which.

    Raises:
        LookupError: If the run ends first, or there is no such part.
    """
    if before is not None:
        require_part(cursor, before, "until_nonfinite")
    return _go_on(cursor, "until_nonfinite", lambda state: not _is_finite(cursor, state), before, "and all was finite")


def nonfinite(cursor: Cursor) -> dict[str, float]:
    """What is nan or infinite in the open iteration, or in the last one: by name, of a tensor its largest magnitude.

    Empty if nothing is. Waits for the device.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> phase = lt.train(model, [torch.ones(1, 1), torch.zeros(1, 1)], lambda model, batch: model(batch / batch))
        >>> run = lt.workflow([(phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)), 1)], max_epochs=1)
        >>> state = run.until_nonfinite(before="update")
        >>> nonfinite(run.cursor)
        {'loss': nan, 'gradient of weight': nan}
    """
    state = cursor.state or cursor.handed
    if state is None:
        return {}
    scalars, tensors = _of(cursor, state)
    found = read({**scalars, **{name: _largest([tensor]) for name, tensor in tensors.items()}})
    return {name: value for name, value in found.items() if not math.isfinite(value)}


# Going on


def _go_on(
    cursor: Cursor,
    verb: str,
    check: Check,
    before: str | None,
    failing: str,
    so_far: Callable[[], str] = lambda: "",
    again: bool = False,
) -> State:
    """Go on until *check* is true: of complete iterations, or of open ones as the part *before* comes next.

    Args:
        cursor: Where the run stands.
        verb: What the user typed.
        check: Asked of each state.
        before: Name of the part, or None.
        failing: Said if the run ends first.
        so_far: Says what more there is to say then.
        again: Whether a state may be found again where it was left.
    """
    if cursor.ended:
        raise LookupError(
            f"{verb}: the run is over ({cursor.ended}), there are no more states. run.reset() or "
            "run.extend(max_epochs=...) goes on."
        )
    seen = 0
    for state in _complete(cursor) if before is None else _open(cursor, before, verb, again):
        seen += 1
        if check(state):
            if before is not None:
                hear()  # the verb called again finds it here
                _left[state] = cursor.line[cursor.at].name
            return state
    many = "1 state was" if seen == 1 else f"{seen} states were"
    raise LookupError(f"{verb}: the run ended ({cursor.ended}) {failing}; {many} looked at.{so_far()}")


def _complete(cursor: Cursor) -> Iterator[State]:
    """Each state as ``next(run)`` hands it out."""
    while True:
        try:
            state = cursor.work(cursor.iterate)
        except StopIteration:
            return
        yield state


def _open(cursor: Cursor, before: str, verb: str, again: bool) -> Iterator[State]:
    """The open state each time that the part *before* comes next."""
    left = None if again or cursor.failed is not None else cursor.state
    if left is not None and not (comes_next(cursor, before, verb) and _left.get(left) == cursor.line[cursor.at].name):
        left = None
    for state in in_front_of(cursor, before, verb):
        if state is not left:
            yield state
        left = None


# Asking the user's function


@attrs.define(eq=False)
class _Asked:
    """The user's function, and what has come of it so far."""

    when: Callable[[State], Any]
    states: int = 0
    without: int = 0  # states that it gave no answer for,
    fields: set[str] = attrs.field(factory=set)  # because of these
    began: int = 0  # epochs done at the first state
    told: bool = False  # that there was no answer so far

    def __call__(self, state: State) -> bool:
        answer = self._answer(state)
        self.states += 1
        self.without += answer is None
        if state.run is not None:
            done = state.run.progress.epoch
            self.began = done if self.states == 1 else self.began
            if done > self.began and self.without == self.states and not self.told:
                self.told = True
                warn(f"until: there was no answer so far.{self.so_far()}")
        if isinstance(answer, Tensor):
            if answer.numel() != 1:
                raise TypeError(
                    f"until: the function gave a tensor of shape {tuple(answer.shape)}, which is not one answer. "
                    "Write .any() or .all() behind it."
                )
            return number(answer) != 0
        return bool(answer)

    def _answer(self, state: State) -> Any:
        try:
            return self.when(state)
        except Exception as error:
            fields = _none_fields(error, state)
            self.fields |= fields
            if fields:
                return None
            instead = stopped_by_user_code("until: the function", error)
            instead.add_note(
                f"until: the function that was given raised this for a state of {state.phase} (iteration "
                f"{state.iteration}). The run stands where it stood, run.state is that state. For states of one phase "
                f'only: lambda s: s.phase == "{state.phase}" and ...'
            )
            raise instead from instead.__cause__

    def so_far(self) -> str:
        """What may be wrong, if there was never an answer; empty otherwise."""
        if not self.states or self.without < self.states:
            return ""
        if not self.fields:
            return " The function gave None each time: does it return its answer?"
        names = " and ".join(sorted(self.fields))
        cure = ""
        if "grad_norm" in self.fields:
            cure = " lt.optimize(optimizer, max_norm=...) measures it, and with inf does no more."
        return f" On all {self.states} states {names} was None: no part sets it.{cure}"


def _none_fields(error: BaseException, state: State) -> set[str]:
    """The fields of *state* that are None and are read where *error* was raised, if it is about a None at all."""
    if not isinstance(error, TypeError | AttributeError) or "NoneType" not in str(error):
        return set()
    names: set[str] = set()
    for frame, _ in list(traceback.walk_tb(error.__traceback__))[1:]:  # the first is ours
        if any(value is state for value in frame.f_locals.values()):
            names.update(frame.f_code.co_names)
    return {name for name in names & MAY_BE_NONE if getattr(state, name) is None}


def _require_one(when: Any, epoch: Any, iteration: Any, before: Any) -> None:
    given = {"when": when, "epoch": epoch, "iteration": iteration}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        alone = f" To stop there in any iteration: run.before({before!r})." if before is not None else ""
        raise ValueError(
            "until: give what to wait for: a function of the state, as in run.until(lambda s: s.loss > 10), or "
            f"iteration=, or epoch=.{alone}"
        )
    if len(given) > 1:
        raise ValueError(
            f"until: give one of when, epoch= and iteration=, got {' and '.join(given)}. Several conditions make one "
            "function: run.until(lambda s: s.epoch == 3 and s.loss > 10)."
        )
    if when is not None:
        _require_function(when)
        return
    (name, value), *_ = given.items()
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        raise ValueError(
            f"until: {name} must be at least 0, got {value}. They are counted from 0; run.back(n) and "
            "run.replay(iteration) go back."
        )
    whole_number(f"until: {name}", value, 0)


def _require_function(when: Any) -> None:
    if isinstance(when, int) and not isinstance(when, bool):
        raise TypeError(f"until: got {when}. Say which number it is: run.until(iteration={when}), or epoch={when}.")
    if isinstance(when, str):
        raise TypeError(
            f"until: got {when!r}. To stop at a part: run.before({when!r}), or run.until(..., before={when!r})."
        )
    if not callable(when) or isinstance(when, type):
        raise TypeError(f"until: give a function of the state, as in run.until(lambda s: s.loss > 10), got {when!r}.")
    try:
        inspect.signature(when).bind(None)
    except ValueError:  # a function in C tells nothing
        return
    except TypeError:
        raise TypeError(
            f"until: the function must take one argument, the state, but takes {inspect.signature(when)}."
        ) from None


# Numbers


def _of_number(cursor: Cursor, epoch: int | None, iteration: int | None, before: str | None) -> Check:
    """Asks for the first training state of *epoch*, or for *iteration*; refuses one that can't come any more."""
    passes, name = cursor.passes, "epoch" if iteration is None else "iteration"
    training = [line for phase in passes.agenda.phases if phase.trains for line in cursor.lines[id(phase)]]
    if before is not None and not matches([slot.name for slot in (*training, *cursor.run_slots)], before):
        raise ValueError(
            f"until: {name}= counts in training, and no training phase has the part {before!r}. Give a function: "
            f'run.until(lambda s: s.{name} == {epoch if iteration is None else iteration}, before="{before}").'
        )
    next_epoch, next_iteration = _ahead(cursor, before)
    if iteration is not None:
        _require_ahead("iteration", iteration, next_iteration, passes.iterations, f"iteration {next_iteration}")
        return lambda state: state.trains and state.iteration >= iteration
    assert epoch is not None
    begins = f"the next one to begin is {next_epoch}"
    _require_ahead("epoch", epoch, next_epoch, passes.epochs, f"iteration {next_iteration} comes next, and {begins}")
    return lambda state: state.trains and state.epoch >= epoch


def _require_ahead(name: str, wanted: int, ahead: int, total: int | None, comes: str) -> None:
    if wanted < ahead:
        comes = f"{comes} comes next" if name == "iteration" else comes
        goes_back = f"run.replay({wanted}) goes back" if name == "iteration" else "run.replay(iteration) goes back"
        raise ValueError(f"until: {name}={wanted} is behind already: {comes}. {goes_back}, if snapshots are kept.")
    if total is not None and wanted >= total:
        raise LookupError(
            f"until: {name}={wanted} will not come: the run has {total} {name}s, 0 to {total - 1}. "
            "run.extend(...) moves its end."
        )


def _ahead(cursor: Cursor, before: str | None) -> tuple[int, int]:
    """The epoch that begins next and the training iteration that comes next, the open one if it will be asked."""
    progress, passes = cursor.progress, cursor.passes
    state = (cursor.unseen if before is None else None) or cursor.state
    under_way = passes.phase is not None and passes.plan.trains and passes.index > 0
    epoch, iteration = progress.epoch + under_way, progress.iteration
    if state is None or not state.trains:
        return epoch, iteration
    if state.dropped or (state is cursor.state and before is not None and _is_past(cursor, before)):
        return epoch, state.iteration + 1
    return state.epoch + (not state.first), state.iteration


def _is_past(cursor: Cursor, wanted: str) -> bool:
    """Whether the open state has seen the part *wanted* already, or will not see it."""
    found = find_one(cursor.part_names, wanted, "until")
    names = [slot.name for slot in cursor.line]
    return found not in names or names.index(found) < cursor.at


# Numbers that are none


def _is_finite(cursor: Cursor, state: State) -> bool:
    """Whether all is finite; waits for the device once."""
    scalars, tensors = _of(cursor, state)
    if tensors:
        scalars["gradients and weights"] = _largest(list(tensors.values()))
    return all(map(math.isfinite, read(scalars).values()))


def _of(cursor: Cursor, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is looked at of *state*: scalars by name, gradients and weights by name."""
    scalars: dict[str, Any] = {"loss": state.loss, **state.metrics}
    if state.loss is not None:
        scalars["loss"] = state.loss
    complete = state is not cursor.state
    line = cursor.line if complete else cursor.line[: cursor.at]
    backwards = [slot.part for slot in cursor.line if isinstance(slot.part, backward)]
    filled = not backwards or any(isinstance(slot.part, backward) for slot in line)
    scaled = any(part.scaler is not None for part in backwards)  # it looks after them itself
    tensors: dict[str, Tensor] = {}
    if not scaled:
        scalars["grad_norm"] = state.grad_norm
    for name, parameter in _parameters(cursor, state) if state.trains else ():
        if filled and not scaled and parameter.grad is not None:
            tensors[f"gradient of {name}"] = parameter.grad
        if complete:
            tensors[f"weight {name}"] = parameter
    usable = {name: plain for name, tensor in tensors.items() if (plain := _plain(tensor)) is not None}
    return {name: value for name, value in scalars.items() if value is not None}, usable


def _parameters(cursor: Cursor, state: State) -> Iterator[tuple[str, Tensor]]:
    """Those of the model by name, then those that an optimizer moves besides."""
    seen: set[int] = set()
    named: Iterable[tuple[str, Tensor]] = state.model.named_parameters() if isinstance(state.model, Module) else ()
    for name, parameter in named:
        seen.add(id(parameter))
        if not is_lazy(parameter):
            yield name, parameter
    for index, parameter in enumerate(parameters_of(optimizers_in(cursor.run))):
        if id(parameter) not in seen and not is_lazy(parameter):
            yield f"parameter {index} of the optimizer", parameter


def _plain(tensor: Tensor) -> Tensor | None:
    """The tensor, or the values of a sparse one; None where there is nothing that could be nan."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return tensor if numbers and tensor.numel() and tensor.layout is torch.strided else None


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in *tensors*, nan if one is; unlike another norm it can't overflow. Stays on its device."""
    return torch.nn.utils.get_total_norm(tensors, math.inf)
