"""What a snapshot holds beyond a checkpoint's tree, which another process could not load."""

from __future__ import annotations

import torch

from ..checkpoints.inventory import inventory
from ..cursor import Cursor
from .copies import Copies, attributes_of, own_of


class Beyond:
    """What a checkpoint's tree leaves out: modes, what layers and optimizers keep aside, which tensor is a buffer.

    Args:
        cursor: The run's machine.
    """

    def __init__(self, cursor: Cursor) -> None:
        found, self._copies = inventory(cursor), Copies()
        modules = list({id(m): m for root in found.modules.values() for m in root.modules()}.values())
        self._copies.known = set(map(id, modules))
        self._modes = [(module, module.training) for module in modules]
        self._buffers = [(module, dict(module._buffers)) for module in modules]
        own = [module for module in modules if type(module).__module__.partition(".")[0] != "torch"]
        self._puts = [attributes_of(module, self._copies) for module in own]
        self._puts += [own_of(optimizer, self._copies) for optimizer in found.optimizers.values()]
        self._copies.copy()

    def put_back(self) -> None:
        """Have it be as it was; that can be done several times."""
        with torch.no_grad():
            self._copies.put_back()
            for module, training in self._modes:
                module.training = training
            for module, buffers in self._buffers:
                module._buffers.clear()
                module._buffers.update(buffers)
            for put in self._puts:
                put()
