"""The one-weight model that most tests train."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what it sends to the background so
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Weight(nn.Module):
    """One weight, at 3; its loss on batch b is w · mean(b), so that its gradient is mean(b)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def forward(self, batch: Tensor) -> Tensor:
        return self.w * batch.mean()


@pytest.fixture
def model() -> Weight:
    return Weight()


@pytest.fixture
def sgd(model: Weight) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1.0)


@pytest.fixture
def batches() -> list[Tensor]:
    """Three batches of two samples, with means 1, 2 and 3."""
    return [torch.full((2, 1), float(n)) for n in (1, 2, 3)]
