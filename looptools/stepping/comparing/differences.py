"""What differs between two states and the runs that they are of, in the order of blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

from ...gradients import optimizers_of
from ...order import FILL
from ...state import State
from ...trials.digests import CLOCKS
from .apart import Gap, Tolerance, leaves
from .listening import Event, modules_of

if TYPE_CHECKING:
    from ...run import Run

Named = dict[str, Tensor]
Found = tuple[str, Gap] | None  # what differs, and how
FACTS = ("trains", "epoch", "iteration", "index", "dropped")


class Differences:
    """Compares, each thing once an iteration as long as nobody writes to it.

    Args:
        models: Those of both runs, by name.
        tolerance: How far apart values may be.
    """

    def __init__(self, models: tuple[Mapping[str, Module], Mapping[str, Module]], tolerance: Tolerance) -> None:
        self.models = models
        self.tolerance = tolerance
        self.order: dict[str, int] = {}  # of the modules in this iteration's forward
        self._same: dict[str, tuple[int, ...]] = {}  # what was compared in this iteration, by its version

    def begin(self) -> None:
        """Another iteration begins: what gradients there are were compared, or are of before."""
        self.order.clear()
        self._same.clear()
        for name, a, b in self._pairs("parameter"):
            self._changed(f"gradient of {name}", a.grad, b.grad, forced=False)

    def facts(self, a: State, b: State) -> Found:
        """Where in the run two states are."""
        for name in FACTS:
            if (mine := getattr(a, name)) != (other := getattr(b, name)):
                return f"state.{name}", Gap(str(mine), str(other))
        return None

    def nested(self, what: str, a: Any, b: Any) -> Found:
        """Two batches, or two outputs."""
        mine, others = dict(leaves(a, what)), dict(leaves(b, what))
        if mine.keys() != others.keys():
            path = next(path for path in [*mine, *others] if path not in mine or path not in others)
            has, lacks = f"has {path}", f"lacks {path}"
            return what, Gap(has if path in mine else lacks, has if path in others else lacks)
        return next((found for path in mine if (found := self._one(path, mine[path], others[path]))), None)

    def behind(self, a: State, b: State, part: Any) -> Found:
        """All that *part* may have changed."""
        forced = bool(optimizers_of(part))  # fused optimizers write unseen
        return (
            self._outputs(a, b)
            or self._gradients(forced=type(part).__name__ in FILL)
            or self._one("grad_norm", a.grad_norm, b.grad_norm)
            or self._one("whether the optimizer moves", a.updates, b.updates)
            or self._one("lr", a.lr, b.lr)
            or self.weights(forced)
        )

    def weights(self, forced: bool) -> Found:
        """Parameters and buffers; *forced*, also those that seem not to have been written to."""
        for kind in ("parameter", "buffer"):
            for name, a, b in self._pairs(kind):
                if self._changed(f"{kind} {name}", a, b, forced) and (gap := self.tolerance.gap(a, b)):
                    return f"{kind} {name}", gap
        return None

    def results(self, a: Run, b: Run) -> Found:
        """What both have found, but for the time."""
        keys = [key for key in a.results if key in b.results and key.rpartition("/")[2] not in CLOCKS]
        found = (self._one(f"result {key}", a.results[key], b.results[key]) for key in keys)
        return next((one for one in found if one), None)

    def _one(self, what: str, a: Any, b: Any) -> Found:
        gap = self.tolerance.gap(a, b)
        return None if gap is None else (what, gap)

    def _outputs(self, a: State, b: State) -> Found:
        mine, others = a.outputs or {}, b.outputs or {}
        for key in (key for key in mine if key in others and key != "loss" and key not in a.metrics):
            if found := self.nested(f"output {key}", mine[key], others[key]):
                return found
        if found := self._one("loss", a.loss, b.loss):
            return found
        for kind, left, right in (("metric", a.metrics, b.metrics), ("gauge", a.gauges, b.gauges)):
            for key in (key for key in left if key in right and key not in CLOCKS):
                if found := self._one(f"{kind} {key}", left[key], right[key]):
                    return found
        return None

    def _gradients(self, forced: bool) -> Found:
        """Of those that differ, the one that backward comes to first; a new one may look like the one before."""
        found: list[tuple[tuple[int, int], str, Gap]] = []
        for number, (name, a, b) in enumerate(self._pairs("parameter")):
            what, here, there = f"gradient of {name}", a.grad, b.grad
            if self._changed(what, here, there, forced) and (gap := self.tolerance.gap(here, there)):
                found.append(((self.order.get(name.rpartition(".")[0], -1), number), what, gap))
        return max(found, key=lambda one: one[0])[1:] if found else None

    def _changed(self, what: str, a: Tensor | None, b: Tensor | None, forced: bool) -> bool:
        """Whether it must be compared: somebody has written to it, as far as that can be seen."""
        if a is None and b is None:
            return False
        version = tuple(n for t in (a, b) for n in ((0, 0) if t is None else (id(t), _version(t))))
        same = self._same.get(what) == version
        self._same[what] = version
        return forced or not same

    def _pairs(self, kind: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Parameters or buffers of both, by name; those whose names only one has, by their order."""
        for word in (word for word in self.models[0] if word in self.models[1]):
            prefix = "" if word == "model" else f"{word}."
            a, b = (_tensors(models[word], kind) for models in self.models)
            others = {**_renamed(a, b), **b}
            for name, tensor in a.items():
                if name in others:
                    yield prefix + name, tensor, others[name]


def of_module(found: tuple[Event, Gap] | None) -> Found:
    """What a comparer has found, in words."""
    if found is None:
        return None
    (name, side, count), gap = found
    again = f" (call {count + 1})" if count else ""
    return (f"module {name} {side}{again}" if name else f"model {side}{again}"), gap


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _renamed(a: Named, b: Named) -> Named:
    """The tensors of *b* by the names of *a*, of those whose names only one of them has."""
    rest = [[(name, tensor) for name, tensor in x.items() if name not in y] for x, y in ((a, b), (b, a))]
    shapes = [[tuple(tensor.shape) for _, tensor in one] for one in rest]
    return {name: other for (name, _), (_, other) in zip(*rest, strict=True)} if shapes[0] == shapes[1] else {}


def _tensors(model: Any, kind: str) -> Named:
    """Parameters or buffers of a model, by names that do not show whether it is compiled."""
    found: Named = {}
    for path, module in modules_of(model):
        own = module._parameters if kind == "parameter" else module._buffers
        for name, tensor in own.items():
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found
