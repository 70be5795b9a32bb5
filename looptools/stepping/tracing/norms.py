"""How long all weights of a model are as one vector, and all gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from ...means import read

HALF = (torch.float16, torch.bfloat16)


def norms(model: Any) -> tuple[float | None, float | None]:
    """The 2-norms of all parameters and of all gradients; None where there are none. Reads the device once.

    Parameters that have no shape or no values yet (lazy ones, those on the meta device) are left out.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> [round(norm, 4) for norm in norms(model)], norms(print)
        ([1.4142, 5.0], (None, None))
    """
    found = list(model.parameters()) if isinstance(model, Module) else []
    parameters = [parameter for parameter in found if not is_lazy(parameter) and not parameter.is_meta]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with torch.no_grad():
        joint = {"weights": _joint(parameters), "gradients": _joint(gradients)}
    numbers = read({name: norm for name, norm in joint.items() if norm is not None})
    return numbers.get("weights"), numbers.get("gradients")


def _joint(tensors: Iterable[Tensor]) -> Tensor | None:
    each = [norm for tensor in tensors for norm in _norm(tensor.detach())]
    return torch.linalg.vector_norm(torch.stack([norm.to(each[0]) for norm in each])) if each else None


def _norm(values: Tensor) -> Iterable[Tensor]:
    """Of one tensor; of half precision in single: one above 65504 would be inf in fp16."""
    if values.is_sparse:
        values = values.coalesce().values()
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point():
        return ()
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32 if values.dtype in HALF else None)
    return (norm if norm.device.type == "mps" else norm.double(),)
