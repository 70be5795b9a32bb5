"""Images, figures and values of histograms as NumPy arrays that any sink can show."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from torch import Tensor


def picture(image: Any) -> Any:
    """Bring *image* into the shape ``(height, width, 3 or 4)``, whole numbers from 0 to 255.

    Args:
        image: A tensor, NumPy array or PIL image of shape ``(height, width)``, ``(channels, height, width)`` or
            ``(height, width, channels)``, with 1, 3 or 4 channels; or a batch ``(n, channels, height, width)``, which
            becomes a grid. Whole numbers go from 0 to 255; what is not whole goes from 0 to 1, and is cut off there.

    Raises:
        ValueError: If it has another shape.

    Example:
        >>> picture(torch.rand(3, 8, 4)).shape, picture(torch.rand(4, 1, 8, 8)).shape
        ((8, 4, 3), (16, 16, 3))
    """
    import numpy

    pixels = image.detach() if isinstance(image, Tensor) else torch.from_numpy(numpy.array(image))
    pixels = pixels.squeeze(0) if pixels.ndim == 4 and pixels.shape[0] == 1 else pixels
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3, 4):
        pixels = _grid(pixels)
    elif pixels.ndim == 2:
        pixels = pixels.unsqueeze(-1)
    elif pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.permute(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.numel():
        raise ValueError(
            f"log.image: an image has the shape (height, width), (channels, height, width) or (n, channels, height, "
            f"width), with 1, 3 or 4 channels, got {tuple(getattr(image, 'shape', pixels.shape))}."
        )
    if pixels.is_floating_point() or pixels.dtype is torch.bool:
        pixels = (pixels.float().nan_to_num(0).clamp(0, 1) * 255).round()
    pixels = pixels.clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, -1, 3 if pixels.shape[-1] == 1 else -1).cpu().numpy()


def _grid(batch: Tensor) -> Tensor:
    """Images side by side, as nearly square as possible: shape ``(rows * height, columns * width, channels)``."""
    number, channels, height, width = batch.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    empty = batch.new_zeros(rows * columns - number, channels, height, width)
    cells = torch.cat([batch, empty]).view(rows, columns, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)


def rendered(figure: Any) -> Any:
    """A matplotlib figure as an array of shape ``(height, width, 4)``; the figure stays open, and as it is.

    Raises:
        TypeError: If it is none.
    """
    if not hasattr(figure, "savefig"):
        raise TypeError(
            f"log.figure: figure must be a matplotlib figure, got a {type(figure).__name__}. Write ax.figure."
        )
    import numpy
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return numpy.array(Image.open(file).convert("RGBA"))


def flattened(values: Any) -> Any:
    """The finite ones of *values* as a flat float64 array.

    Raises:
        ValueError: If there is none.
    """
    import numpy

    tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(numpy.array(values))
    flat = tensor.reshape(-1).cpu().double()
    finite = flat[flat.isfinite()]
    if not finite.numel():
        raise ValueError(f"log.histogram: there is no finite value among the {flat.numel()} given.")
    return finite.numpy()
