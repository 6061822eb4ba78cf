"""Frozen layers: whether a backward pass trains the experts, or only asks them for the gradients of its inputs.

Experts belong to everybody in a swarm, and their servers train them in the backward pass itself. So a caller that wants
no training must not cause any: where a layer is frozen (`requires_grad_(False)`), and where only gradients of inputs
are asked for, as by `torch.autograd.grad(score, x)` for a saliency map. Experts learn in the passes in which the
layer's own parameters do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def gradient_nodes(tensors: Iterable[Tensor]) -> list[Any]:
    """The nodes of the autograd graph in which the gradients of these tensors arrive; none for those without one."""
    if not torch.is_grad_enabled():
        return []
    nodes = []
    for tensor in tensors:
        if tensor.requires_grad:
            node: Any = tensor.grad_fn
            if node is None:  # a leaf: its node is known by those that follow it
                follower: Any = tensor.view_as(tensor).grad_fn
                node = follower.next_functions[0][0]
            nodes.append(node)
    return nodes


def are_wanted(nodes: Iterable[Any]) -> bool:
    """Whether the backward pass that is running computes the gradients of any of these nodes."""
    return any(_is_wanted(node) for node in nodes)


def _is_wanted(node: Any) -> bool:
    leaf = getattr(node, "variable", None)
    if leaf is not None and not leaf.requires_grad:  # frozen since the forward pass: torch gives it no gradient either
        return False
    asked = getattr(torch._C, "_will_engine_execute_node", None)
    if asked is None:  # a torch that does not say
        return True
    try:
        return bool(asked(node))
    except RuntimeError:  # so torch answers about a leaf whose gradient `autograd.grad` was asked for
        return True
