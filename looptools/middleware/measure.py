"""Measure a whole pass."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import Module

from ..devices import move
from ..pipeline import name_of
from ..state import State

if TYPE_CHECKING:
    from ..run import Run

Given = tuple[Any, ...] | dict[str, Any]  # what metrics are called with: positions, or keywords


def _accumulates(metric: Any) -> bool:
    """Whether it is made like a metric of torchmetrics."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def _pairs(metrics: Any) -> tuple[tuple[str, Any], ...]:
    """Read the option ``metrics=``. Pairs, since modules in a plain field are taken for models of the run."""
    if isinstance(metrics, Mapping):
        pairs = tuple(metrics.items())
    elif _accumulates(metrics) and hasattr(metrics, "keys"):  # a MetricCollection brings its own names
        pairs = (("", metrics),)
    elif isinstance(metrics, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in metrics):
        pairs = metrics
    else:
        raise TypeError(
            'measure: metrics must have names, as in {"auroc": BinaryAUROC(), "f1": a_function}, or be a '
            f"MetricCollection; got {metrics!r:.80}."
        )
    if not pairs:
        raise ValueError("measure: there is nothing to measure. Give at least one metric, or drop this middleware.")
    for name, metric in pairs:
        if not isinstance(name, str):
            raise TypeError(f"measure: a metric's name must be a string, got {name!r}.")
        if isinstance(metric, type):
            kind = metric.__name__
            raise TypeError(f"measure: {name} is the class {kind}. Make a metric of it: {kind}(...).")
        if not callable(metric) and not _accumulates(metric):
            raise TypeError(
                f"measure: {name} must be a torchmetrics metric, or a function of the whole pass's inputs; "
                f"got {metric!r:.80}."
            )
    return pairs


def _takes_state(part: Any, field: Any, inputs: Any) -> None:
    if not callable(inputs) or _accumulates(inputs):
        raise TypeError(
            "measure: inputs must be a function of the state, as in "
            f'lambda state: (state.outputs["logits"], state.batch[1]); got {inputs!r:.80}.'
        )


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class measure:
    """Measure what cannot be averaged over batches, such as F1 or AUROC, over each whole pass of a phase.

    Metrics of torchmetrics (any object with ``update``, ``compute`` and ``reset``) take the inputs in at each
    iteration; a function is called once, with the inputs of all iterations. On the pass's last state the results go to
    ``state.gauges``, and so to ``run.results["val/f1"]``, not averaged. A result must be one number, or a mapping of
    numbers by their own names, as a MetricCollection gives.

    A run works on copies of the metrics, moved to the device of the inputs, and starts them afresh with each pass. The
    device is read only if a metric's own code does. The inputs that a function needs are kept, detached but not copied,
    until the pass ends: so many batches of them, twice while they are joined. Pipe it on behind parts that drop states
    or may fail; in training, behind ``optimize``: a state that was counted stays so.

    Args:
        metrics: Metrics and functions by name, or a MetricCollection. Functions get the pass's tensors concatenated
            along the first dimension (scalars stacked), lists joined.
        inputs: ``inputs(state)``: a tuple of what metrics are called with, a mapping for keywords, or the one thing.
        keep_on: Device where the inputs for functions are kept, as in ``"cpu"``, which waits for each; None
            leaves them where they are.

    Raises:
        TypeError: If a result is not a scalar.
        ValueError: If a name is one of the step's scalars already.

    Example:
        >>> def best_f1(scores, labels):
        ...     hits = labels[scores.argsort(descending=True)].cumsum(0)
        ...     return (2 * hits / (torch.arange(len(labels)) + 1 + labels.sum())).max()
        >>> data = [(torch.tensor([0.1, 0.8]), torch.tensor([0, 1])), (torch.tensor([0.3, 0.9]), torch.tensor([1, 0]))]
        >>> val = lt.validate(None, data, lambda model, batch: {"scores": batch[0]})
        >>> val = val | lt.measure({"f1": best_f1}, lambda state: (state.outputs["scores"], state.batch[1]))
        >>> round(val.to_end()["val/f1"], 3)
        0.8
    """

    metrics: tuple[tuple[str, Any], ...] = attrs.field(
        converter=_pairs, repr=lambda pairs: ", ".join(name or name_of(metric) for name, metric in pairs)
    )
    inputs: Callable[[State], Any] = attrs.field(validator=_takes_state, repr=name_of)
    keep_on: str | torch.device | None = attrs.field(
        default=None, kw_only=True, converter=attrs.converters.optional(torch.device)
    )
    counted: int = attrs.field(default=0, init=False, repr=False)  # states of this pass
    kept: list[Given] = attrs.field(factory=list, init=False, repr=False)  # their inputs, for functions
    _functions: dict[str, Callable[..., Any]] = attrs.field(init=False, repr=False)
    _own: dict[str, Any] | None = attrs.field(default=None, init=False, repr=False)  # this run's copies of the metrics
    _device: torch.device | None = attrs.field(default=None, init=False, repr=False)  # where those are
    _seen: Callable[[], State | None] | None = attrs.field(default=None, init=False, repr=False)  # the state
    _by: set[str] = attrs.field(factory=set, init=False, repr=False)  # that these metrics have taken in,
    _done: bool = attrs.field(default=False, init=False, repr=False)  # and all the rest too
    only_looks: ClassVar[bool] = True
    closes_pass: ClassVar[bool] = True

    def __attrs_post_init__(self) -> None:
        self._functions = {name: metric for name, metric in self.metrics if not _accumulates(metric)}

    @property
    def own(self) -> dict[str, Any]:
        """The metrics that a run works with, by name; copied when they are first needed."""
        if self._own is None:
            self._own = {name: copy.deepcopy(metric) for name, metric in self.metrics if _accumulates(metric)}
            for metric in self._own.values():
                metric.reset()
        return self._own

    def on_build(self, run: Run) -> None:
        """Refuse a place behind `average`, where results come too late."""
        if any(slot.part is self and slot.of_run for slot in run.cursor.slots):
            raise TypeError("measure: pipe it onto the phase whose passes it measures: val | lt.measure(...).")

    def on_pass(self, run: Run) -> None:
        """Begin a new pass."""
        self._restart()

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        for state in states:
            last = state.last  # may fetch a batch, and fail: so before anything is counted
            if self._seen is None or self._seen() is not state:  # else it comes again, after a failure
                self._seen, self._by, self._done = weakref.ref(state), set(), False
                if state.first:  # in a pipe without a run; there, on_pass does it
                    self._restart()
            with torch.no_grad():
                if not state.dropped and not self._done:
                    self._count(state)
                if last and self.counted:
                    self._finish(state)
            yield state

    def _restart(self) -> None:
        self.counted = 0
        self.kept.clear()
        for metric in self.own.values():
            metric.reset()

    def _count(self, state: State) -> None:
        """Take in the inputs of *state*; where some metrics have done so before a failure, the others."""
        if not self.counted:
            self._require_free((name for name, _ in self.metrics), state)
        given = self._take(state)
        if not self.counted and self._functions:
            for value in given.values() if isinstance(given, dict) else given:
                _require_joinable(value)
        device = next((tensor.device for tensor in _tensors(given)), self._device)
        if device != self._device:
            for metric in self.own.values():
                if hasattr(metric, "to"):
                    metric.to(device)
            self._device = device
        for name, metric in self.own.items():
            if name not in self._by:
                metric.update(**given) if isinstance(given, dict) else metric.update(*given)
                self._by.add(name)
        if self._functions:
            self.kept.append(given if self.keep_on is None else move(given, self.keep_on))  # type: ignore[arg-type]
        self.counted += 1
        self._done = True
        state.committed = state.committed or "measure has counted it"

    def _take(self, state: State) -> Given:
        try:
            given = self.inputs(state)
        except Exception as error:
            has = ", ".join(map(str, state.outputs or {})) or "nothing"
            error.add_note(f"measure: its inputs could not be had from the state. The step returned {has}.")
            raise
        if isinstance(given, Mapping):
            return {key: _detached(value) for key, value in given.items()}
        return tuple(map(_detached, given)) if isinstance(given, tuple) else (_detached(given),)

    def _finish(self, state: State) -> None:
        results: dict[str, Any] = {}
        for name, metric in self.own.items():
            _add(results, name, metric.compute())
        if self._functions:
            given = _joined(self.kept)
            for name, function in self._functions.items():
                _add(results, name, function(**given) if isinstance(given, dict) else function(*given))
        self._require_free(results, state)
        state.gauges.update(results)
        self._restart()  # what a pass has kept is not needed any more

    def _require_free(self, names: Iterable[str], state: State) -> None:
        for name in names:
            if name in state.metrics or name in state.gauges:
                raise ValueError(
                    f"measure: {name!r} is among what {state.phase} logs already, the step's scalars or another "
                    "part's. Give it another name."
                )

    def state_dict(self) -> dict[str, Any]:
        """What the pass has given so far, in plain values and tensors."""
        metrics = {name: _memory(metric) for name, metric in self.own.items()}
        return {"counted": self.counted, "kept": list(self.kept), "metrics": metrics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.counted, self.kept = state["counted"], list(state["kept"])
        for name, metric in self.own.items():
            if name in state["metrics"]:
                _remember(metric, state["metrics"][name])
        self._device = None

    def carry_over(self, old: measure) -> None:
        """Take the place of *old*: metrics of the same name and kind go on where they stand."""
        same = {name for name, metric in self.own.items() if type(old.own.get(name)) is type(metric)}
        memory = old.state_dict()
        self.load_state_dict({**memory, "metrics": {name: memory["metrics"][name] for name in same}})
        self._seen, self._by, self._done = old._seen, old._by, old._done


def _detached(value: Any) -> Any:
    """Without the graph, which would be kept until the pass ends."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    if type(value) is dict:
        return {key: _detached(item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested inputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _require_joinable(value: Any) -> None:
    """Refuse at the first batch what could not be put together at the last."""
    if not isinstance(value, Tensor | list):
        raise TypeError(
            f"measure: a whole pass of {type(value).__name__} cannot be joined for a function. Let inputs give tensors "
            "or lists, as in torch.as_tensor(value); leave None out."
        )


def _joined(kept: list[Given]) -> Given:
    """The inputs of a whole pass."""
    first = kept[0]
    if isinstance(first, dict):
        return {key: _join([given[key] for given in kept]) for key in first}  # type: ignore[call-overload]
    return tuple(_join(list(column)) for column in zip(*kept, strict=True))


def _join(column: list[Any]) -> Any:
    if all(isinstance(piece, Tensor) for piece in column):
        here = [piece.to(column[-1].device) for piece in column]  # those from a checkpoint may lie elsewhere
        try:
            return torch.cat(here) if column[0].ndim else torch.stack(here)
        except RuntimeError as error:
            error.add_note("measure: functions get the inputs of the whole pass, joined along the first dimension.")
            raise
    if all(isinstance(piece, list) for piece in column):
        return [item for piece in column for item in piece]
    kinds = " and ".join(sorted({type(piece).__name__ for piece in column}))
    raise TypeError(f"measure: inputs were {kinds} in turn, which cannot be joined for a function.")


def _add(results: dict[str, Any], name: str, value: Any) -> None:
    """Put a metric's result, or each of several, among *results*."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _add(results, str(key), item)
        return
    if name in results:
        raise ValueError(f"measure: there are two results called {name!r}. Give one of them another name.")
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        results[name] = value.detach().clone().reshape(())  # a metric may write its own memory anew
    elif not isinstance(value, Tensor) and hasattr(value, "__float__") and not getattr(value, "shape", ()):
        results[name] = float(value)
    else:
        shape = f"of shape {tuple(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
        raise TypeError(
            f"measure: {name!r} must be one number for the whole pass, but is {shape}. Average it (torchmetrics: "
            'average="macro"), or measure a function that makes numbers of it: {"worst": lambda scores, labels: ...}.'
        )


def _memory(metric: Any) -> dict[str, Any]:
    """What a metric has taken in. Those of torchmetrics leave it out of their state_dict, each by its own flag."""
    if not isinstance(metric, Module):
        return dict(metric.state_dict()) if hasattr(metric, "state_dict") else dict(getattr(metric, "__dict__", {}))
    return {
        path: {
            "updates": module._update_count,
            "state": {key: list(v) if isinstance(v, list) else v for key, v in module.metric_state.items()},
            "beside": _beside(module),
        }
        for path, module in _metrics_in(metric)
    }


def _remember(metric: Any, memory: dict[str, Any]) -> None:
    """Give a metric back what `_memory` gave."""
    if not isinstance(metric, Module):
        if hasattr(metric, "load_state_dict"):
            metric.load_state_dict(memory)
        else:
            vars(metric).update(memory)
        return
    for path, module in _metrics_in(metric):
        module._update_count, module._computed = memory[path]["updates"], None
        vars(module).update(memory[path].get("beside", {}))
        for key, value in memory[path]["state"].items():
            setattr(module, key, list(value) if isinstance(value, list) else value)


def _metrics_in(metric: Module) -> list[tuple[str, Any]]:
    """The metrics of a collection, or of a wrapper, or the one that it is."""
    return [(path, module) for path, module in metric.named_modules() if hasattr(module, "_update_count")]


def _beside(metric: Any) -> dict[str, Any]:
    """Plain values that a metric keeps beside its states, as MinMaxMetric and Running do."""
    own = {*metric._defaults, *vars(Module()), "_computed", "_forward_cache", "_update_count", "_update_called"}
    return {key: value for key, value in vars(metric).items() if key not in own and type(value) in (int, float, Tensor)}
