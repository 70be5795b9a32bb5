"""Keep a part of the model as it is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from torch.nn import Module, Parameter
from torch.utils.weak import WeakIdKeyDictionary

from ..intervals import Interval, epochs, interval, iterations, rounds, samples, seconds
from ..modes import set_mode, settle
from ..state import State
from ..warn import warn

if TYPE_CHECKING:
    from ..cursor import Cursor
    from ..phases import Phase
    from ..run import Run

# Parameters and modules whose flag a freeze has changed, and which freeze did it last: so that another run over the
# same model can tell them from those that are the user's own, and no run gives back what another one holds.
_ours: MutableMapping[Any, weakref.ref[freeze]] = WeakIdKeyDictionary()
_WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, torch.compile
# How far a run is, as each kind of interval counts; any other interval is asked about each state.
_DONE: dict[Any, Callable[[Any], float]] = {
    iterations: lambda run: run.progress.iteration,
    epochs: lambda run: run.progress.epoch,
    rounds: lambda run: run.progress.round,
    samples: lambda run: run.progress.samples,
    seconds: lambda run: run.seconds,
}


def _names(names: Iterable[Any]) -> tuple[str, ...]:
    names = tuple(names)
    if not names:
        raise ValueError('freeze: give names of submodules or parameters, as in freeze("backbone").')
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f'freeze: a name must be a string such as "backbone" or "head.bias", got a {type(name).__name__}. '
                "Give the name that the submodule has in the model."
            )
    return names


def _until(value: Any) -> Any:
    if value is None:
        return None
    try:
        return interval(value)
    except TypeError:
        raise TypeError(
            f"freeze: until must be lt.epochs(n), a number of training iterations, another interval or a function of "
            f"the state, got {value!r}."
        ) from None


@attrs.define(eq=False, init=False, on_setattr=attrs.setters.NO_OP)
class freeze:
    """Keep submodules and parameters of the phase's model as they are, from before the first forward on.

    Their parameters do not require gradients, and submodules stand in eval mode while the model trains, so that
    BatchNorm's statistics stand still and dropout is off. When *until* is first due they are thawed at the iteration's
    boundary: the next forward is the first that trains them. Flags are changed during this phase's passes only, and
    given back when another pass begins, or the run ends or is closed; what you have frozen yourself stays frozen. Where
    two freezes overlap, the later *until* holds.

    The optimizer may hold the frozen parameters all along: it leaves alone what has no gradient, as in a loop by hand.
    DistributedDataParallel must be told to expect that: ``find_unused_parameters=True``.

    Args:
        name: Dotted names, in the model or behind its wrappers: of submodules, with all that is in them, or of
            parameters.
        names: More of them, as an iterable.
        until: ``lt.epochs(3)``, a number of training iterations, another interval or a predicate of the state; None
            for the whole run.
        keep_eval: Whether submodules stand in eval mode.

    Raises:
        LookupError: If the model has no such submodule or parameter, when the run is built.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> train = lt.train(model, [torch.ones(1, 1)] * 2, lambda model, batch: model(batch).mean())
        >>> run = lt.workflow([(train | lt.freeze("0", until=lt.epochs(1)) | lt.optimize(sgd), 1)], max_epochs=2)
        >>> [model[0].weight.grad is not None for state in run]
        [False, False, True, True]
    """

    names: tuple[str, ...] = attrs.field(converter=_names)
    until: Interval | None = attrs.field(kw_only=True, converter=_until, default=None)
    keep_eval: bool = attrs.field(kw_only=True, default=True, validator=attrs.validators.instance_of(bool))
    thawed: bool = attrs.field(default=False, init=False, repr=False)
    _run: Run | None = attrs.field(default=None, init=False, repr=False)
    _model: Module | None = attrs.field(default=None, init=False, repr=False)  # of the pass under way
    _held: dict[int, Parameter | Module] = attrs.field(factory=dict, init=False, repr=False)
    closes_pass: ClassVar[bool] = True  # what stands behind the loop runs only if the loop has begun

    def __init__(self, *name: str, names: Iterable[str] = (), until: Any = None, keep_eval: bool = True) -> None:
        self.__attrs_init__((*name, *names), until=until, keep_eval=keep_eval)

    def on_build(self, run: Run) -> None:
        """See that the names are there."""
        cursor = run.cursor
        for phase in cursor.passes.agenda.phases:
            if any(slot.part is self for slot in cursor.lines[id(phase)]):
                self._check(phase)
        if any(slot.part is self for slot in cursor.run_slots):
            raise TypeError("freeze: pipe it onto the phase whose model it is about, not onto the run.")

    def _check(self, phase: Phase) -> None:
        if not phase.trains:
            raise ValueError(f"freeze: {phase.name} trains nothing. Pipe it onto a training phase.")
        if not isinstance(phase.model, Module):
            kind = type(phase.model).__name__
            raise TypeError(
                f"freeze: the model of {phase.name} is a {kind}, not a torch.nn.Module, so it has no names."
            )
        for name in self.names:
            _find(phase.model, name)

    def on_pass(self, run: Run) -> None:
        """Freeze before the pass's first forward; or thaw, if *until* came while other phases ran."""
        self._give_back()
        assert run.phase is not None
        self._run, self._model = run, run.phase.model
        self.thawed = self.thawed or self._is_over(run)
        self._hold()

    on_resume = on_pass  # its memory says whether it was thawed within the pass

    def _is_over(self, run: Run) -> bool:
        done, until = _DONE.get(type(self.until)), self.until
        return done is not None and done(run) >= until.n  # type: ignore[union-attr]

    def __call__(self, states: Iterable[State]) -> Iterator[State]:
        until: Any = self.until
        counts = type(until) in _DONE
        for state in states:
            if state.run is None:
                raise RuntimeError("freeze: these states belong to no run, so nothing was frozen. Iterate a phase.")
            if until is not None and not self.thawed:
                if counts:
                    state.run.at_boundary(self._look)
                elif not state.dropped and until(state):
                    state.run.at_boundary(self._thaw)
            yield state
        self._leave()

    def _look(self, run: Run) -> None:
        if self._is_over(run):
            self._thaw(run)

    def _thaw(self, run: Run) -> None:
        self.thawed = True
        self._give_back()
        for slot in run.cursor.line:  # what another one keeps frozen too
            if isinstance(slot.part, freeze):
                slot.part._hold()

    def _hold(self) -> None:
        """Change the flags that stand the other way, and keep in mind which these are."""
        model = self._model
        if model is None or self.thawed:
            return
        settle(model, True)  # the flags of train mode are meant
        for thing in self._named(model):
            if thing in _ours or _is_live(thing):
                _set_live(thing, False)
                _ours[thing] = weakref.ref(self)
                self._held[id(thing)] = thing

    def _named(self, model: Module) -> Iterator[Parameter | Module]:
        """The parameters, and the submodules if they stand in eval mode, that the names mean in *model*."""
        for name in self.names:
            found = _find(model, name)
            if isinstance(found, Parameter):
                yield found
                continue
            yield from found.parameters()
            if self.keep_eval:
                yield from found.modules()

    def _give_back(self) -> None:
        """Put the flags back that were changed, but those that another run's freeze has taken over meanwhile."""
        if self._model is not None and self._held:
            _thaw(self._model, [thing for thing in self._held.values() if _owner(thing) in (None, self)])
            self._held.clear()

    def _leave(self) -> None:
        """The loop or the run is over; give back, unless the run only sleeps in the middle of the pass."""
        if self._run is not None and (self._run.phase is None or self._run.ended):
            self._give_back()

    def close(self) -> None:
        """Give the flags back if the run is over."""
        self._leave()

    def on_remove(self, run: Run) -> None:
        """Give the flags back: nobody else would."""
        self._give_back()

    def carry_over(self, old: freeze) -> None:
        """Take the place of *old*: its flags are given back when the next pass begins, or when it would be thawed."""
        self.thawed, self._run, self._model, self._held = old.thawed, old._run, old._model, old._held
        for thing in self._held.values():
            if _owner(thing) is old:
                _ours[thing] = weakref.ref(self)


def see_who_froze(cursor: Cursor) -> None:
    """Look, when a run is built, for what a freeze of another run holds of the models that it trains.

    A run that was left in the middle of a pass, as by an exception, holds its own for good, and a cell that is run
    again without the freeze would train without them. If it is gone they are given back; else that is said.
    """
    for phase in cursor.passes.agenda.phases:
        if phase.trains and isinstance(phase.model, Module) and _strangers(cursor, phase):
            gc.collect()  # runs are cycles, and a variable that is written again leaves one behind
            found = _strangers(cursor, phase)
            _thaw(phase.model, [thing for thing, owner in found if owner is None])
            names = {owner: ", ".join(map(repr, owner.names)) for _, owner in found if owner is not None}
            if names:
                warn(
                    f"{phase.name}: freeze({'; '.join(names.values())}) of another run, which stands in the middle of "
                    "a pass, keeps a part of the model frozen, also here. Call close() on that run (state.run.close(), "
                    "if only a state of it is left), or pipe a freeze here too."
                )


def _strangers(cursor: Cursor, phase: Phase) -> list[tuple[Parameter | Module, freeze | None]]:
    """What a freeze holds that is none of this run's, and which one; None if that is gone."""
    if not _ours:
        return []
    phases = cursor.passes.agenda.phases
    until_then = phases[: phases.index(phase) + 1]  # what an earlier one freezes it gives back itself
    own = [(slot.part, p.model) for p in until_then for slot in cursor.lines[id(p)] if isinstance(slot.part, freeze)]
    named = {id(thing) for part, model in own for thing in part._named(model)}
    things = [*phase.model.parameters(), *phase.model.modules()]
    marked = [thing for thing in things if thing in _ours and id(thing) not in named]
    return [(thing, _owner(thing)) for thing in marked if not _is_live(thing)]  # else thawed by hand since


def is_ours(thing: Parameter) -> bool:
    """Whether a freeze keeps it frozen, and will give its flag back."""
    return thing in _ours


def _owner(thing: Parameter | Module) -> freeze | None:
    """The freeze that changed its flag last, if there is one and it is not gone."""
    return _ours[thing]() if thing in _ours else None


def _is_live(thing: Parameter | Module) -> bool:
    return thing.training if isinstance(thing, Module) else thing.requires_grad


def _set_live(thing: Parameter | Module, live: bool) -> None:
    if isinstance(thing, Module):
        thing.training = live
    else:
        thing.requires_grad_(live)


def _thaw(model: Module, things: Iterable[Parameter | Module]) -> None:
    """Put flags back that a freeze has changed, in the model's train mode, which these are about."""
    training = model.training
    settle(model, True)
    for thing in things:
        _set_live(thing, True)
        _ours.pop(thing, None)
    if not training:
        set_mode(model, False)


def _find(model: Module, name: str) -> Module | Parameter:
    """The submodule or parameter of that name; wrappers on the way are passed through.

    Raises:
        LookupError: If there is none, with the names that there are.
    """
    at, path = model, name.split(".")
    for depth, piece in enumerate(path):
        at = _within(at, piece)
        known = _children(at)
        found = known.get(piece)
        if isinstance(found, Parameter) and depth == len(path) - 1:
            return found
        if not isinstance(found, Module):
            where = piece if found is not None else ".".join(path[:depth]) or type(at).__name__
            there = "is a parameter" if found is not None else f"has {', '.join(known) or 'nothing'}"
            raise LookupError(f"freeze: there is no {name!r} in the model. {where} {there}.")
        at = found
    return at


def _children(module: Module) -> dict[str, Module | Parameter]:
    """Its own submodules and parameters."""
    own = {**module._modules, **module._parameters}
    return {name: child for name, child in own.items() if child is not None}


def _within(module: Module, piece: str) -> Module:
    """The module itself, or what it wraps if *piece* is to be looked for there."""
    known = _children(module)
    while piece not in known and len(known) == 1:
        (name, inner), *_ = known.items()
        if name not in _WRAPPERS or not isinstance(inner, Module):
            break
        module, known = inner, _children(inner)
    return module
