"""Run the user's step on the batch."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import Module

from ..devices import count_samples, model_device
from ..modes import Switches, settle
from ..pipeline import name_of
from ..state import State

Call = Callable[[State], Any]


def _dtype(value: Any) -> torch.dtype | None:
    """Read an option ``autocast=``: a dtype, its name, or None."""
    dtype = getattr(torch, value, value) if isinstance(value, str) else value
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'forward: autocast must be a dtype such as torch.bfloat16 or "bfloat16", got {value!r}.')
    return dtype


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class forward:
    """Call the step, and put what it returns on the state.

    Sets ``state.outputs``, ``state.loss``, ``state.num_samples``, and in ``state.metrics`` the step's scalars,
    detached. First the model is put into train or eval mode if it is in the other one. Validation steps run
    under ``torch.no_grad()``, which is left again before the state moves on.

    If the same state comes a second time, after a failure, the torch generators are first set back to what they
    were, so that dropout draws the same.

    It may stand several times in a pipe (a GAN's two steps). Each one's loss and outputs take the place of those
    before it, and so do metrics of the same name: the ``"loss"`` that is averaged and logged is the last one's. Give
    them names of their own to see both: ``{"loss": loss, "d_loss": loss}``.

    Args:
        step: ``step(model, batch)`` -> the loss, or a mapping with ``"loss"``. A third parameter named ``state``
            gets the State, one named ``train_mode`` whether the phase trains. None calls the model's own
            ``train_step(batch, optimizer)`` or ``val_step(batch, optimizer)``. A mapping's ``"num_samples"`` (an
            int) weighs the iteration in averages, otherwise the batch's first dimension does; its ``"log_vars"``,
            if there, is what is logged.
        autocast: Dtype of ``torch.autocast`` around the step alone, as in ``torch.bfloat16``.

    Raises:
        TypeError: If the step's parameters or its result are not of this kind.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> states = [State(phase="train", model=model, batch=torch.ones(4, 1))]
        >>> state = next(forward(lambda model, batch: model(batch).mean())(states))
        >>> state.loss.requires_grad, state.metrics["loss"].requires_grad, state.num_samples
        (True, False, 4)
    """

    step: Callable[..., Any] | None = attrs.field(
        repr=lambda step: "the model's own" if step is None else name_of(step)
    )
    autocast: torch.dtype | None = attrs.field(default=None, kw_only=True, converter=_dtype)
    _call: Call | None = attrs.field(init=False, repr=False)  # None: call step(model, batch) directly
    _device: torch.device | None = attrs.field(default=None, init=False, repr=False)
    _seen: Callable[[], State | None] | None = attrs.field(default=None, init=False, repr=False)
    _drawn: list[Tensor] = attrs.field(factory=list, init=False, repr=False)
    _switches: int = attrs.field(default=-1, init=False, repr=False)
    _own: set[int] = attrs.field(factory=set, init=False, repr=False)
    _generators: list[torch.Generator] = attrs.field(factory=list, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._call = _own_step if self.step is None else _adapt(self.step)

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        call = self._call is not None
        for state in states:
            model = state.model
            if self._switches != Switches.count or (isinstance(model, Module) and model.training is not state.trains):
                self._settle(model, state.trains)
            if state.first or self._device is None:
                self._look_at(model)
            if self._seen is not None and self._seen() is state:
                for generator, drawn in zip(self._generators, self._drawn, strict=True):
                    generator.set_state(drawn)
            else:
                self._seen = None  # Ctrl-C may strike before all are kept
                self._drawn.clear()
                for generator in self._generators:
                    self._drawn.append(generator.get_state())
                self._seen = weakref.ref(state)
            if self.autocast is not None:
                result = self._in_its_modes(state)
            elif state.trains:
                result = self._call(state) if call else self.step(model, state.batch)  # type: ignore[misc]
            else:
                grad = torch.is_grad_enabled()
                torch.set_grad_enabled(False)  # no `with`: a context manager costs two calls more
                try:
                    result = self._call(state) if call else self.step(model, state.batch)  # type: ignore[misc]
                finally:
                    torch.set_grad_enabled(grad)
            self._take(state, result)
            state.forwarded = self
            yield state

    def recompute(self, state: State) -> Tensor:
        """The loss of the state's batch once more, at the weights as they are now and with fresh random numbers.

        In the phase's mode and under the same autocast; nothing on the state changes, but BatchNorm's statistics move
        once more. For optimizers that evaluate the loss several times a step.

        Raises:
            TypeError: If the step gives no loss.
        """
        if self._device is None:
            self._look_at(state.model)
        if isinstance(state.model, Module) and state.model.training is not state.trains:
            self._settle(state.model, state.trains)
        with torch.set_grad_enabled(state.trains):
            result = self._in_its_modes(state)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"forward: the loss of iteration {state.iteration} of {state.phase} was to be computed again, but the "
                f"step gave none this time (it returned {type(result).__name__})."
            )
        return loss

    def carry_over(self, old: forward) -> None:
        """Take the place of *old*: a state that comes again finds the same random numbers."""
        self._device, self._generators = old._device, old._generators
        self._seen, self._drawn = old._seen, old._drawn

    def leaves(self, state: State) -> str:
        """What a failure in the middle of this part can leave behind."""
        buffers = state.trains and isinstance(state.model, Module) and next(state.model.buffers(), None) is not None
        return "the model's buffers (BatchNorm statistics) may have taken this batch in already" if buffers else ""

    def _settle(self, model: Any, training: bool) -> None:
        """Some model was switched since the last state, or this one is in the other mode."""
        if isinstance(model, Module):
            settle(model, training)
        self._switches = Switches.count

    def _look_at(self, model: Any) -> None:
        """Once a pass: where the model is, which generators its layers draw from, and what tensors are its own."""
        tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, Module) else ()
        self._own = {id(tensor) for tensor in tensors}
        self._device = model_device(model) or torch.device("cpu")
        self._generators = [torch.default_generator]
        if self._device.type == "cuda":
            index = torch.cuda.current_device() if self._device.index is None else self._device.index
            self._generators.append(torch.cuda.default_generators[index])

    def _in_its_modes(self, state: State) -> Any:
        """What the step returns, under autocast if that is asked for, and in validation without gradients."""
        assert self._device is not None
        call = self._call or (lambda state: self.step(state.model, state.batch))  # type: ignore[misc]
        cast = torch.autocast(self._device.type, self.autocast) if self.autocast is not None else nullcontext()
        with torch.set_grad_enabled(state.trains and torch.is_grad_enabled()), cast:
            return call(state)

    def _take(self, state: State, result: Any) -> None:
        if isinstance(result, Tensor):
            outputs: Mapping[str, Any] = {"loss": result}
        elif isinstance(result, dict) or isinstance(result, Mapping):  # noqa: SIM101 (asking an ABC costs a call)
            outputs = result
        else:
            raise TypeError(
                f"forward: the step returned {type(result).__name__} in iteration {state.iteration} of {state.phase}. "
                'Return the loss, a tensor of one element, or a mapping with "loss".'
            )
        loss: Any = outputs.get("loss")
        if loss is not None and not (isinstance(loss, Tensor) and (loss.ndim == 0 or loss.numel() == 1)):
            shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"forward: the loss of iteration {state.iteration} of {state.phase} must be a tensor of one element, "
                f"got {shape}. Average it with .mean(), and do not call .item() on it."
            )
        state.outputs, state.loss = outputs, loss
        number = outputs.get("num_samples")
        if number is None:
            batch = state.batch
            usual = type(batch) in (tuple, list) and batch and isinstance(batch[0], Tensor) and batch[0].ndim
            number = batch[0].size(0) if usual else count_samples(batch)
        state.num_samples = number
        if not isinstance(number, int):
            raise TypeError(
                f"forward: num_samples must be an int, got {number!r} in iteration {state.iteration} of {state.phase}. "
                "A batch's size is len(batch) or batch.shape[0]."
            )
        metrics = state.metrics
        for key, value in outputs.get("log_vars", outputs).items():
            if isinstance(value, Tensor):
                # Another tensor of one element may be the logits of a last batch of one sample.
                scalar = not value.ndim or (value.numel() == 1 and (key == "loss" or "log_vars" in outputs))
                if scalar and not value.is_complex():
                    value = value.detach() if value.requires_grad else value
                    if id(outputs.get(key)) in self._own or value._is_view():  # the update will change it
                        value = value.clone()
                    metrics[key] = value if value.ndim == 0 else value.reshape(())
            elif isinstance(value, int | float) and key != "num_samples":
                metrics[key] = value
        if loss is not None and "loss" not in metrics:
            metrics["loss"] = loss.detach().reshape(())


def _adapt(step: Callable[..., Any]) -> Call | None:
    """Find out how *step* wants to be called."""
    if not callable(step):
        raise TypeError(
            f"forward: step must be a function step(model, batch), got {step!r}. "
            "The order is train(model, source, step)."
        )
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except ValueError:  # a function in C tells nothing
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if parameters and len(names) < 2 and not starred:
        raise TypeError(f"forward: {name_of(step)} must take (model, batch), but takes ({', '.join(names)}).")
    if len(names) > 3 or (len(names) == 3 and names[2] not in ("state", "train_mode")):
        raise TypeError(
            f"forward: the third parameter of {name_of(step)} must be named state or train_mode, got {names[2]!r}. "
            "Bind further arguments with functools.partial or a lambda, by keyword."
        )
    if len(names) < 3:
        return None
    if names[2] == "state":
        return lambda state: step(state.model, state.batch, state)
    return lambda state: step(state.model, state.batch, state.trains)


def _own_step(state: State) -> Any:
    """Call the model's train_step or val_step, as mmcv 1.x does."""
    model = state.model if hasattr(state.model, "train_step") else getattr(state.model, "module", state.model)
    step = model.train_step if state.trains else model.val_step
    optimizer = state.run.optimizer if state.run is not None else None
    return step(state.batch, optimizer) if _wants_optimizer(step) else step(state.batch)


def _wants_optimizer(step: Callable[..., Any]) -> bool:
    parameters = inspect.signature(step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
