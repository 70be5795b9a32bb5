"""A gentle beginning for any schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs
from torch.optim import Optimizer

from ..checks import one_of, whole
from ..intervals import epochs
from .options import between

if TYPE_CHECKING:
    from ..run import Run


def _count(part: warmup, field: Any, count: Any) -> None:
    if not isinstance(count, epochs):
        whole(0)(part, field, count)


@attrs.frozen(eq=False)
class warmup:
    """A factor that grows from *ratio* to 1 over the first *count* steps.

    Linear (Goyal et al., "Accurate, Large Minibatch SGD", section 2.2): 1 - (1 - done/count)(1 - ratio).
    Exponential: ratio^(1 - done/count), mmcv's, a line on a logarithmic scale. Constant: *ratio* (He et al., "Deep
    Residual Learning", section 4.2, begin so). From step *count* on it is 1. The schedule
    under it runs from step 0, unmoved. A momentum is divided by the factor instead, so that it begins high.

    Args:
        count: Steps of warm-up, 0 for none; or ``lt.epochs(n)``, the steps of so many epochs.
        ratio: The factor at step 0, in (0, 1].
        kind: ``"linear"``, ``"exponential"`` or ``"constant"``.

    Raises:
        ValueError: If *ratio* is no such fraction.

    Example:
        >>> [warmup(2, ratio=0.5)(done) for done in range(4)]
        [0.5, 0.75, 1.0, 1.0]
    """

    count: int | epochs = attrs.field(default=0, validator=_count)
    ratio: float = attrs.field(default=0.1, validator=between(0, 1, low_too=False))
    kind: Literal["linear", "exponential", "constant"] = attrs.field(
        default="linear", validator=one_of("linear", "exponential", "constant")
    )

    def __bool__(self) -> bool:
        return self.count != 0

    def bound(self, run: Run, by: str, optimizer: Optimizer) -> warmup:
        """The same with *count* in steps of *run*, which are updates of *optimizer* or iterations.

        Raises:
            ValueError: If it is given in epochs, and their steps cannot be known.
        """
        if not isinstance(self.count, epochs):
            return self
        n = self.count.n
        count, within = run.total(by, optimizer, epochs=n), run.total("epoch", optimizer, epochs=n)
        if not count or not within:
            raise ValueError(
                f"warmup: {by}s of {n} epochs cannot be counted, since the training source has no length. "
                "Give the count itself (warmup=500), or the entry a length: (train, lt.iterations(1000))."
            )
        return attrs.evolve(self, count=round(count * n / within))  # where the run is shorter than its warm-up

    def __call__(self, done: int) -> float:
        count: Any = self.count
        if done >= count:
            return 1.0
        if self.kind == "constant":
            return self.ratio
        left = 1 - done / count
        return 1 - left * (1 - self.ratio) if self.kind == "linear" else float(self.ratio**left)
