"""Figures that show themselves in a notebook, and touch neither pyplot nor anybody's backend."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120


def new_figure(verb: str, width: float, height: float) -> Figure:
    """Make an empty figure of so many inches.

    Args:
        verb: What the user typed, for the error.
        width: In inches.
        height: In inches.

    Returns:
        A figure that is drawn as a PNG where it is a notebook cell's value.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> new_figure("plot", 4, 3)._repr_png_()[1:4]
        b'PNG'
    """
    try:
        kind: type[Figure] = __getattr__("Figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{verb} needs matplotlib. Install it: pip install "torch-looptools[plot]".', name=error.name
        ) from error
    return kind(figsize=(width, height), layout="constrained")


def _repr_png_(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def __getattr__(name: str) -> Any:
    """Make the class `Figure` when it is first asked for, by `new_figure` or by pickle: only then is matplotlib there.

    A plain Figure is shown in notebooks only once pyplot has been imported.
    """
    if name != "Figure":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from matplotlib.figure import Figure as Plain  # not pyplot: no window opens, and nobody's backend is changed

    if name not in globals():
        own = {"_repr_png_": _repr_png_, "__module__": __name__, "__doc__": Plain.__doc__}
        globals()[name] = type(name, (Plain,), own)
    return globals()[name]


def tidy(axes: Axes) -> None:
    """Draw a light grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Any) -> None:
    """Write *figure* to *path*, whose folder is made if missing; its ending says as what."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
