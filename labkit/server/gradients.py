"""The gradients of one pass of an expert, for its inputs and its parameters. Plain functions of tensors.

On a batch's way: `server/backend` asks for them in a backward pass, and steps its optimizer with what it gets.

Legend: rows = samples of a batch, always dimension 0 of every tensor; the other dimensions are the expert's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.errors import BadRequest
from labkit.server.expert_module import ExpertModule
from labkit.server.user_code import contained
from labkit.server.validation import CallOptions, check_finite, describe, rows_not_finite, schema_of


def gradients_of(
    expert: ExpertModule, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor], options: CallOptions
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients of the floating-point inputs, and those of the parameters, by name. Changes only buffers."""
    inputs, grad_outputs = tensors[: -options.outputs], tensors[-options.outputs :]
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.enable_grad(), contained():
        # 1. The forward pass again, this time with a graph.
        outputs = expert(leaves, options.keywords)
        if [t.shape for t in outputs] != [t.shape for t in grad_outputs] or not all(
            t.is_floating_point() for t in grad_outputs
        ):
            there, here = describe(schema_of(outputs)), describe(schema_of(grad_outputs))
            raise BadRequest(f"expert {expert.uid} has output {there} for these inputs; the output gradient is {here}")
        # 2. All gradients.
        names = list(parameters) if options.train else []
        sources = [*wanted, *(parameters[name] for name in names)]
        grads: Sequence[Tensor | None] = [None] * len(sources)
        losses = [
            Weighed.apply(output, grad.to(output.dtype))  # type: ignore[no-untyped-call]
            for output, grad in zip(outputs, grad_outputs, strict=True)
            if output.requires_grad
        ]
        if losses and sources:
            grads = torch.autograd.grad(losses, sources, allow_unused=True)
        # An embedding may give sparse ones.
        grads = [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]
        input_grads = [
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, grads, strict=False)
        ]
    of_parameters = zip(names, grads[len(wanted) :], strict=True)
    return input_grads, {name: grad for name, grad in of_parameters if grad is not None}


def gradients_of_good_rows(
    expert: ExpertModule, parameters: Mapping[str, Tensor], tensors: Sequence[Tensor], options: CallOptions
) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """As `gradients_of`, and the number of good rows. Rows whose input gradient overflows add nothing to the others'.

    What they would do to the parameters is not known row by row, so the others are computed once more without them.
    """
    with expert.buffers_restored(always=False) as undo:
        input_grads, grads = gradients_of(expert, parameters, tensors, options)
        bad = rows_not_finite(input_grads)
        if bad is None:
            return input_grads, grads, len(tensors[0])
        undo()
    good = (~bad).nonzero()[:, 0]
    if not len(good):
        return input_grads, {}, 0
    again, grads = gradients_of(expert, parameters, [t[good] for t in tensors], options)
    check_finite(again, f"finite inputs gave expert {expert.uid} an input gradient")
    return [grad.index_copy(0, good, rows) for grad, rows in zip(input_grads, again, strict=True)], grads, len(good)


class Weighed(torch.autograd.Function):
    """A number whose gradient by `output` is `grad_output`: what `autograd.grad` starts from without a look at shapes.

    To compare the shapes of an output and a gradient that is given, torch 2 imports sympy: most of a CPU-second in the
    first backward pass of each server.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad_output: Tensor) -> Tensor:
        ctx.grad_output = grad_output
        return torch.zeros((), device=output.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_output, None
