"""What the modules of a model are given and give, while one run works, and then another one like it."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from .apart import Gap, Tolerance, leaves

Event = tuple[str, str, int]  # the module's name, "input" or "output", and how often it was called before
Told = list[tuple[str, Tensor]]  # tensors with their places


def modules_of(model: Any, inside: bool = True) -> Iterator[tuple[str, Module]]:
    """The modules of a model, each once, by names that do not show whether it is compiled or distributed.

    Args:
        model: A module; anything else has none.
        inside: Whether those within compiled modules are meant too.
    """
    seen: set[int] = set()

    def visit(path: str, module: Module) -> Iterator[tuple[str, Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        compiled = module._modules.get("_orig_mod")
        behind = compiled or (module.module if isinstance(module, DataParallel | DistributedDataParallel) else None)
        if behind is not None and (inside or compiled is None):
            yield from visit(path, behind)
            return
        yield path, module
        if inside or (compiled is None and module._compiled_call_impl is None):
            for name, child in module.named_children():
                yield from visit(f"{path}.{name}" if path else name, child)

    if isinstance(model, Module):
        yield from visit("", model)


class Listener:
    """Keeps copies of what modules are given and give, in the order in which they are called.

    What runs within a compiled module or function is not heard: listening would change what is compiled.
    """

    def __init__(self) -> None:
        self.told: dict[Event, Told] = {}
        self.order: dict[str, int] = {}  # when a module was done last
        self._counts: Counter[str] = Counter()
        self._copies: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    @contextlib.contextmanager
    def listening(self, model: Any) -> Iterator[None]:
        """Within the ``with``, hear the modules of *model*."""
        self._counts.clear()
        with contextlib.ExitStack() as stack:
            for name, module in modules_of(model, inside=False):
                if module._compiled_call_impl is not None:  # its hooks are compiled too
                    stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                    module._compiled_call_impl = self._around(name, module._compiled_call_impl)
                elif not isinstance(module, torch.jit.ScriptModule):
                    before, after = self._hooks(name)
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
                    stack.callback(module.register_forward_hook(after).remove)
            yield

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        calls: list[int] = []  # those that are under way

        def before(module: Module, given: Any, named: Any) -> None:
            if not torch.compiler.is_compiling():
                calls.append(self._begin(name, given, named))

        def after(module: Module, given: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and calls:
                self._hear((name, "output", calls.pop()), output)

        return before, after

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            count = self._begin(name, given, named)
            output = call(*given, **named)
            self._hear((name, "output", count), output)
            return output

        return called

    def _begin(self, name: str, given: Any, named: Any) -> int:
        count = self._counts[name]
        self._counts[name] += 1
        self._hear((name, "input", count), [*given, named] if named else list(given))
        return count

    def _hear(self, event: Event, value: Any) -> None:
        tensors = [(path, tensor) for path, tensor in leaves(value) if isinstance(tensor, Tensor)]
        if event[1] == "output":
            self.order[event[0]] = len(self.told)
        self._take(event, tensors)

    def _take(self, event: Event, tensors: Told) -> None:
        self.told[event] = [(path, self._copy(tensor)) for path, tensor in tensors]

    def _copy(self, tensor: Tensor) -> Tensor:
        """What one module gives and the next is given is copied once."""
        version = -1 if tensor.is_inference() else tensor._version
        known = self._copies.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version >= 0:
            return known[2]
        copied = tensor.detach().clone()
        self._copies[id(tensor)] = weakref.ref(tensor), version, copied
        return copied


class Comparer(Listener):
    """Compares what it hears with what another one has heard, up to the first difference.

    Args:
        other: The other one.
        tolerance: How far apart values may be.
    """

    def __init__(self, other: Listener, tolerance: Tolerance) -> None:
        super().__init__()
        self.other = other
        self.tolerance = tolerance
        self.found: tuple[Event, Gap] | None = None

    def _take(self, event: Event, tensors: Told) -> None:
        expected = self.other.told.get(event)
        if self.found is not None or expected is None:
            return
        for (_, a), (_, b) in zip(expected, tensors, strict=False):
            gap = self.tolerance.gap(a, b.detach())
            if gap is not None:
                self.found = event, gap
                return
