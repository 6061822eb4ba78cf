"""Calling experts: one request to one expert, reported as an event, and to the directory, however it ends.

On a batch's way: `client/dispatch` decides who is asked for which rows; this asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import trio
from torch import Tensor

from labkit.directory import Directory
from labkit.errors import BadReply, CallCancelled, DeadlineExceeded, RPCError
from labkit.events import CallFailed, CallFinished, Emit, ignore
from labkit.expert_uid import ExpertInfo
from labkit.wire.rpc import BULK, Caller


@dataclass(frozen=True, slots=True)
class Answer:
    """What an expert answered. `updates`: optimizer steps that it had made."""

    tensors: Sequence[Tensor]
    updates: int


class ExpertClient:
    """Calls experts. Failures are told to the directory, so that a lost server is not asked again."""

    def __init__(self, caller: Caller, directory: Directory, emit: Emit = ignore) -> None:
        self._caller = caller
        self._directory = directory
        self._emit = emit

    async def forward(
        self, expert: ExpertInfo, inputs: Sequence[Tensor], output_shape: tuple[int, ...] | None, **how: Any
    ) -> Answer:
        """Inputs [rows, ...] -> one output [rows, *output_shape] (any shape if None). `how`: see `_call`."""
        shape = None if output_shape is None else (inputs[0].shape[0], *output_shape)
        return await self._call("forward", expert, inputs, [shape], **how)

    async def backward(
        self, expert: ExpertInfo, inputs: Sequence[Tensor], grad_output: Tensor, **how: Any
    ) -> Answer:
        """Inputs and output gradient -> gradients of the floating-point inputs, in their order. `how`: see `_call`."""
        shapes = [tuple(tensor.shape) for tensor in inputs if tensor.is_floating_point()]
        return await self._call("backward", expert, [*inputs, grad_output], shapes, **how)

    async def _call(
        self,
        direction: str,
        expert: ExpertInfo,
        tensors: Sequence[Tensor],
        shapes: Sequence[tuple[int, ...] | None],
        *,
        timeout: float,
        codec: str = "none",
        give_up: trio.CancelScope | None = None,
    ) -> Answer:
        """Call for at most `timeout` seconds, or until `give_up` ends, which counts as a timeout of the expert.

        Raises a kind of `RPCError`; `BadReply` for an answer of other shapes than these, or with NaN or infinity.
        """
        started = trio.current_time()
        rows = tensors[0].shape[0]
        try:
            with trio.CancelScope() if give_up is None else give_up as scope:
                reply = await self._caller.call(
                    expert.contact, f"expert.{direction}", [expert.uid], tensors, returns=tuple[float, float, int],
                    timeout=timeout, lane=BULK, codec=codec,
                )  # fmt: skip
                check_answer(reply.tensors, shapes, expert)
            if scope.cancelled_caught:
                waited = trio.current_time() - started
                raise DeadlineExceeded(f"{expert.contact.endpoint} was not waited for any longer, after {waited:.3g} s")
        except RPCError as error:
            self._failed(direction, expert, rows, started, error)
            raise
        except trio.Cancelled:
            self._failed(direction, expert, rows, started, CallCancelled("the caller needed the answer no more"))
            raise
        self._directory.report_success(expert)
        queue, compute, updates = reply.body
        self._emit(
            CallFinished(
                uid=expert.uid, address=expert.contact.endpoint, direction=direction, rows=rows,
                seconds=trio.current_time() - started, queue=queue, compute=compute, bytes=reply.bytes,
                updates=updates,
            )
        )  # fmt: skip
        return Answer(reply.tensors, updates)

    def _failed(self, direction: str, expert: ExpertInfo, rows: int, started: float, error: RPCError) -> None:
        seconds = trio.current_time() - started
        self._directory.report_failure(expert, error)
        self._emit(
            CallFailed(
                uid=expert.uid, address=expert.contact.endpoint, direction=direction, rows=rows, seconds=seconds,
                cause=error.cause, detail=str(error),
            )
        )  # fmt: skip


def check_answer(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...] | None], expert: ExpertInfo) -> None:
    """Raise `BadReply` unless the tensors are finite floats of these shapes (None: any)."""
    if len(tensors) != len(shapes):
        raise BadReply(f"{expert.uid} answered with {len(tensors)} tensors instead of {len(shapes)}")
    for tensor, shape in zip(tensors, shapes, strict=True):
        if shape is not None and tuple(tensor.shape) != shape:
            raise BadReply(f"{expert.uid} answered with shape {list(tensor.shape)} instead of {list(shape)}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise BadReply(f"{expert.uid} answered with values that are not finite numbers")
