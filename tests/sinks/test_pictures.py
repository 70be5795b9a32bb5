"""Images in any shape."""

from __future__ import annotations

import numpy
import pytest
import torch

from looptools.sinks.pictures import flattened, picture, rendered


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 7), (5, 7, 3)),
        ((1, 5, 7), (5, 7, 3)),
        ((3, 5, 7), (5, 7, 3)),
        ((4, 5, 7), (5, 7, 4)),
        ((5, 7, 3), (5, 7, 3)),
        ((1, 3, 5, 7), (5, 7, 3)),
        ((6, 3, 5, 7), (10, 21, 3)),
    ],
)
def test_shapes(shape, expected):
    """Gray becomes colour, a batch a grid, channels come last."""
    array = picture(torch.rand(shape))

    assert (array.shape, array.dtype) == (expected, numpy.uint8)


def test_values():
    """Whole numbers stay as they are; others go from 0 to 1, and are cut off there."""
    assert picture(torch.tensor([[0.0, 0.5], [1.0, 7.0]]))[..., 0].ravel().tolist() == [0, 128, 255, 255]
    assert picture(numpy.array([[3, 300]]))[0, :, 0].tolist() == [3, 255]
    assert picture(torch.tensor([[True, False]]))[0, :, 0].tolist() == [255, 0]
    assert picture(torch.rand(2, 2, dtype=torch.bfloat16)).shape == (2, 2, 3)


def test_a_grid_keeps_the_order_of_its_images():
    """Row by row; what is left over is black."""
    batch = torch.arange(1, 4, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)

    assert picture(batch)[::2, ::2, 0].tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize("shape", [(3,), (2, 5, 7), (2, 2, 5, 7), (0, 4)])
def test_what_is_no_image_is_refused(shape):
    """With the shapes that are."""
    with pytest.raises(ValueError, match=r"an image has the shape \(height, width\)"):
        picture(torch.zeros(shape))


def test_a_figure_stays_as_it_is():
    """It is drawn, not closed, and keeps its canvas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50)
    canvas = figure.canvas

    assert rendered(figure).shape == (50, 100, 4)
    assert figure.canvas is canvas
    with pytest.raises(TypeError, match=r"figure must be a matplotlib figure, got a Axes. Write ax\.figure"):
        rendered(figure.subplots())


def test_histograms_leave_out_what_is_not_finite():
    """And refuse to show nothing."""
    assert flattened(torch.tensor([[1.0, float("nan")], [2.0, float("inf")]])).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="no finite value among the 1 given"):
        flattened([float("nan")])
