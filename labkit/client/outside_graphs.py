"""Layers and what captures or transforms torch code: torch.compile goes around them, others say that they cannot.

A layer waits for the network in the middle of a pass, which is nothing that a compiler could put into a graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

REASON = (
    "a layer of labkit calls experts over the network, which no graph can hold: torch.compile(model) runs it between "
    "two graphs; leave fullgraph=True out"
)


def outside_graphs(forward: F) -> F:
    """Decorate the `forward` of a layer: torch.compile breaks its graph there, and runs it as it is.

    Tracing, exporting, and the transformations of torch.func raise `RuntimeError`.
    """

    @functools.wraps(forward)
    def run(self: Any, *inputs: Any, **keywords: Any) -> Any:
        _refuse_what_cannot_be(self)
        dynamo = sys.modules.get("torch._dynamo")  # imported by whoever compiles; it takes more than a second
        if dynamo is None or not _is_ready(dynamo):
            return forward(self, *inputs, **keywords)
        return _disabled(forward)(self, *inputs, **keywords)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # what `torch.compiler.disable` sets
    run._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


@functools.cache
def _disabled(forward: Callable[..., Any]) -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]  # its `reason` is younger than torch 2.6
    return disabled


def _is_ready(dynamo: Any) -> bool:
    """Whether it is imported to its end: another thread may be importing it."""
    return hasattr(dynamo, "disable")


def _refuse_what_cannot_be(layer: Any) -> None:
    """Raise `RuntimeError` within what would record the layer's answers as if they were constants, or vectorise it."""
    name = type(layer).__name__
    if torch._C._get_tracing_state() is not None:
        what = "torch.jit.trace and the older ONNX export would record this one answer as a constant"
    elif getattr(torch.compiler, "is_exporting", bool)():  # which torch 2.6 does not have
        what = "torch.export cannot hold it in a graph"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        what = "torch.func and vmap cannot look into it; use torch.autograd.grad, or a loop over rows"
    else:
        return
    raise RuntimeError(f"{name} calls experts over the network: {what}")
