"""Frozen layers: whether a backward pass trains the experts, or only asks them for the gradients of its inputs.

Experts belong to everybody in a swarm, and their servers train them in the backward pass itself. So a caller that wants
no training must not cause any: where a layer is frozen (`requires_grad_(False)`), and where only gradients of inputs
are asked for, as by `torch.autograd.grad(score, x)` for a saliency map. Experts learn in the passes in which the
layer's own parameters do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StandIn(NamedTuple):
    """What goes into the graph of one pass for a tensor, as a parameter of the gate, whose gradient is asked after.

    It has no elements, and this pass alone has it. The node of a parameter itself must never come into Python's hands:
    while it is held there, torch takes the GIL under the parameter's lock, for which another pass in another thread
    waits with the GIL in its hands. Nor may it be a view: that gets another node when the parameter is updated.
    """

    tensor: Tensor
    empty: Tensor

    @property
    def is_wanted(self) -> bool:
        """Whether the backward pass that is running computes the gradient of the tensor."""
        if not self.tensor.requires_grad:  # frozen since the forward pass: torch gives it no gradient either
            return False
        asked = getattr(torch._C, "_will_engine_execute_node", None)
        return asked is None or bool(asked(self.empty.grad_fn))  # an older torch does not say


def stand_ins(tensors: Iterable[Tensor]) -> list[StandIn]:
    """Those of the tensors that need a gradient, to be made inputs of the pass; none where gradients are off."""
    if not torch.is_grad_enabled():
        return []
    return [StandIn(tensor, tensor.flatten()[:0].clone()) for tensor in tensors if tensor.requires_grad]


def are_wanted(stand_ins: Sequence[StandIn]) -> bool:
    """Whether the backward pass that is running computes the gradient of any of them."""
    return any(one.is_wanted for one in stand_ins)
