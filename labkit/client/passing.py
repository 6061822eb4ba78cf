"""The experts' answers in autograd's graph: its backward pass goes through the network, too, and trains the experts.

On a batch's way: whoever has dispatched a forward pass (`client/moe`, `client/chosen`) puts its outputs through
`differentiable`. When their gradients come back, `client/dispatch` sends them to the experts that answered.
"""

# n: rows of the batch; k: slots of a row; out: shape of one row's output

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from labkit.client.dispatch import DispatchConfig, Dispatched, dispatch_backward
from labkit.client.expert_client import for_the_wire
from labkit.client.frozen import StandIn, are_wanted
from labkit.client.inputs import check_finite
from labkit.client.session import Session


@dataclass
class Passing:
    """What the backward pass needs to know of the forward pass, beside tensors."""

    session: Session
    config: DispatchConfig
    sent: Dispatched
    keywords: tuple[str, ...]
    train: bool | None  # None for where the gate is trained
    gate: list[StandIn] = field(default_factory=list)  # for the gate's parameters


def differentiable(passing: Passing, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The answers [n, k, *out], in full precision on the device of the inputs, as functions of the inputs [n, ...]."""
    # Where the pass trains experts, something goes in that needs a gradient, so that autograd asks for the backward
    # pass even if no input does.
    anchors = [torch.zeros(0, requires_grad=True)] if passing.train else [one.empty for one in passing.gate]
    # What the function gives is on the CPU, so that its backward pass runs in the thread that calls it. A GPU has
    # one autograd thread for the whole process, which must not wait for the network.
    answers = ExpertOutputs.apply(passing, outputs, len(anchors), *anchors, *inputs)  # type: ignore[no-untyped-call]
    return tuple(answer.to(inputs[0].device) for answer in answers)


class ExpertOutputs(torch.autograd.Function):
    """The experts' answers as a differentiable function of what the experts were sent."""

    @staticmethod
    def forward(
        ctx: Any, passing: Passing, outputs: Sequence[Tensor], count: int, *anchors_then_inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.passing, ctx.count = passing, count
        ctx.save_for_backward(*anchors_then_inputs[count:])
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        inputs, passing = ctx.saved_tensors, ctx.passing
        nothing = (None,) * (3 + ctx.count)
        train = are_wanted(passing.gate) if passing.train is None else passing.train
        if not train and not any(ctx.needs_input_grad[len(nothing) :]):
            return *nothing, *(None for _ in inputs)
        local = [for_the_wire(tensor) for tensor in inputs]
        local_grads = [for_the_wire(grad) for grad in grad_outputs]
        check_finite(passing.sent.name, "output gradients", local_grads, passing.sent.answered)
        grads = passing.session.run(
            dispatch_backward, passing.session, passing.config, passing.sent, local, local_grads, passing.keywords,
            train,
        )  # fmt: skip
        returned = (grad if grad is None else grad.to(x.device, x.dtype) for grad, x in zip(grads, inputs, strict=True))
        return *nothing, *returned
