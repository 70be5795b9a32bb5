"""Where two runs that should do the same first do not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from ..checkpoints.inventory import inventory
from ..checks import whole_number
from ..data.loaders import keeps_workers
from ..phases import Phase
from .comparing.apart import Tolerance
from .comparing.lockstep import LockStep

if TYPE_CHECKING:
    from ..run import Run


@attrs.frozen(eq=False, repr=False)
class Divergence:
    """Where two runs first differ: what `first_divergence` finds.

    Args:
        iteration: Training iterations before this one.
        epoch: Training passes before this one.
        phase: Name of the phase; empty before the first iteration.
        part: Full name of the part behind which they differ; ``"batches"``, ``"boundary"``, or empty before the first
            iteration.
        what: What differs: ``"module layer2.conv output"``, ``"gradient of fc.weight"``, ``"loss"``.
        a: What the first has, in words; of a tensor the element that differs most.
        b: What the second has.
        difference: The largest one of two elements; nan where there is none to tell, inf where one is not finite.
        nan: Who has some: ``"a"``, ``"b"``, ``"both"`` or ``""``.
        runs: Both runs, standing where they were found to differ; ``next(run)`` goes on.
    """

    iteration: int
    epoch: int
    phase: str
    part: str
    what: str
    a: str
    b: str
    difference: float = math.nan
    nan: str = ""
    runs: tuple[Any, Any] = (None, None)

    def __repr__(self) -> str:
        where = f"iteration {self.iteration} (epoch {self.epoch}, {self.phase}), {self.part}"
        where = where if self.phase else "before the first iteration"
        by = "differs" if math.isnan(self.difference) else f"differs by up to {self.difference:.3g}"
        by += {"": "", "both": ", with nan in both"}.get(self.nan, f", with nan in {self.nan} only")
        return f"<Divergence at {where}: {self.what} {by}: {self.a} in a, {self.b} in b>"


def first_divergence(
    a: Run | Phase, b: Run | Phase, *, rtol: float = 0.0, atol: float = 0.0, iterations: int | None = None
) -> Divergence | None:
    """Run two runs in lock-step, part by part, and say where they first differ: eager and compiled, before and after.

    Behind each part that both have, by name, these are compared, and the first that differs is told: the batch; what
    modules are given and give, in the order of their calls; outputs, loss and metrics; gradients, those that backward
    comes to first; the gradient norm and the learning rate; parameters and buffers. At the end of a pass its results.
    Names of compiled and distributed modules are those of the modules behind. What runs within a compiled function is
    not looked into. Parameters of other names go together in their order, if their shapes agree.

    Random numbers are no difference: before each part of the second, the generators that both draw from are set to
    where they stood before that part of the first. Torch's compiler draws in its own way, unless
    ``torch._inductor.config.fallback_random`` is set before it compiles. What the modules give in one iteration is
    kept, and the device is read often.

    Args:
        a: A run, or a phase for one pass of it.
        b: Another one with models, optimizers and loaders of its own, that stands at the same place.
        rtol: How far apart two numbers may be, relative to the second,
        atol: and besides that.
        iterations: At most so many iterations, of all phases; None for all.

    Returns:
        The first difference, or None if there is none. Its ``runs`` stand right there.

    Raises:
        RuntimeError: If both train the same model or would take batches from each other, or an iteration is open.
        ValueError: If they do not stand at the same place.

    Example:
        >>> def phase(scale):
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
        ...     sgd = torch.optim.SGD(model.parameters(), lr=scale)
        ...     data = [torch.ones(1, 2)] * 3
        ...     return lt.train(model, data, lambda model, batch: model(batch).sum()) | lt.optimize(sgd)
        >>> print(lt.first_divergence(phase(0.1), phase(0.1)))
        None
        >>> found = lt.first_divergence(phase(0.1), phase(0.2))
        >>> found.iteration, found.part, found.what, found.a, found.b
        (0, 'train/update', 'lr', '0.1', '0.2')
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"first_divergence: {name} must be a number from 0 on, got {value!r}.")
    if iterations is not None:
        whole_number("first_divergence: iterations", iterations)
    runs = _run_of(a), _run_of(b)
    _require_comparable(*runs)
    found = LockStep(*runs, Tolerance(rtol, atol)).go(iterations)
    if found is None:
        return None
    gap, place = found.gap, found.state or runs[0].progress
    phase = "" if found.state is None else found.state.phase
    return Divergence(
        place.iteration, place.epoch, phase, found.part, found.what, gap.a, gap.b, gap.difference, gap.nan, runs
    )


def _run_of(given: Any) -> Run:
    if isinstance(given, Phase):
        return iter(given)
    if not hasattr(given, "cursor"):
        raise TypeError(f"first_divergence: give two runs or phases, got {given!r:.80}.")
    return given  # type: ignore[no-any-return]


def _require_comparable(a: Run, b: Run) -> None:
    found = [inventory(run.cursor) for run in (a, b)]
    held = [
        {id(thing) for m in one.modules.values() for thing in (*m.modules(), *m.parameters())}
        | set(map(id, one.optimizers.values()))
        for one in found
    ]
    if not held[0].isdisjoint(held[1]):
        raise RuntimeError(
            "first_divergence: both train the same model. Give the second one a copy with an optimizer of its own: "
            "copy.deepcopy(model), or fork a run: a, b = run.fork(2)."
        )
    mine = {id(source.given): source for source in a.cursor.passes.sources.values()}
    for name, other in ((s.name, s.given) for s in b.cursor.passes.sources.values() if id(s.given) in mine):
        if hasattr(other, "__next__") or keeps_workers(other):
            raise RuntimeError(
                f"first_divergence: both take batches from the same source of {name}, a {type(other).__name__} that "
                "serves one at a time. Give each its own, or a list of batches."
            )
    for run in (a, b):
        if run.cursor.state is not None:
            raise RuntimeError("first_divergence: an iteration is open. Finish it first: next(run).")
    places = [(run.progress.epoch, run.progress.iteration, run.cursor.passes.index) for run in (a, b)]
    if places[0] != places[1]:
        words = " and ".join("epoch {}, iteration {}, batch {}".format(*place) for place in places)
        raise ValueError(f"first_divergence: the runs do not stand at the same place, but at {words}.")
