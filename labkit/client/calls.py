"""Calling experts: one request to one expert, reported as an event, and to the directory, however it ends.

On a batch's way: `client/dispatch` decides who is asked for which rows; this asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
import trio
from torch import Tensor

from labkit.directory import Directory
from labkit.errors import BadReply, CallCancelled, DeadlineExceeded, RPCError
from labkit.events import CallFailed, CallFinished, Emit, ignore
from labkit.expert_uid import ExpertInfo
from labkit.wire.rpc import BULK, Caller

Like = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of an answer
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # a server's word: one that cannot be is a `BadReply`
Updates = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Figures = tuple[Seconds, Seconds, Updates]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an expert answered. `updates`: optimizer steps that it had made."""

    tensors: Sequence[Tensor]
    updates: int


class ExpertClient:
    """Calls experts. Failures are told to the directory, so that a lost server is not asked again.

    `in_flight`: calls under way; changed in the lab thread only, and read from anywhere.
    """

    def __init__(self, caller: Caller, directory: Directory, emit: Emit = ignore) -> None:
        self.in_flight = 0
        self._caller = caller
        self._directory = directory
        self._emit = emit

    async def forward(
        self, expert: ExpertInfo, inputs: Sequence[Tensor], output_shape: tuple[int, ...] | None, **how: Any
    ) -> Answer:
        """Inputs [rows, ...] -> one output [rows, *output_shape] of the first's dtype (None: of any shape and dtype).

        `how`: see `_call`.
        """
        like = None if output_shape is None else ((len(inputs[0]), *output_shape), inputs[0].dtype)
        return await self._call("forward", expert, inputs, [like], **how)

    async def backward(self, expert: ExpertInfo, inputs: Sequence[Tensor], grad_output: Tensor, **how: Any) -> Answer:
        """Inputs and output gradient -> gradients of the floating-point inputs, in their order. `how`: see `_call`."""
        like = [(tuple(tensor.shape), tensor.dtype) for tensor in inputs if tensor.is_floating_point()]
        return await self._call("backward", expert, [*inputs, grad_output], like, **how)

    async def _call(
        self,
        direction: str,
        expert: ExpertInfo,
        tensors: Sequence[Tensor],
        like: Sequence[Like | None],
        *,
        timeout: float,
        codec: str = "none",
        give_up: trio.CancelScope | None = None,
        seen: int | None = None,
    ) -> Answer:
        """Call for at most `timeout` seconds, or until `give_up` ends, which counts as a timeout of the expert.

        `seen`: for a backward pass, the `updates` that the expert answered in the forward pass of these rows. Raises a
        kind of `RPCError`; `BadReply` for an answer of other shapes than `like`, or with NaN or infinity.
        """
        started = trio.current_time()
        rows = tensors[0].shape[0]
        self.in_flight += 1
        try:
            with trio.CancelScope() if give_up is None else give_up as scope:
                reply = await self._caller.call(
                    expert.contact, f"expert.{direction}", [expert.uid, seen], tensors, returns=Figures,
                    timeout=timeout, lane=BULK, codec=codec,
                )  # fmt: skip
                answer = checked(reply.tensors, like, expert)
            if scope.cancelled_caught:
                waited = trio.current_time() - started
                raise DeadlineExceeded(f"{expert.contact.endpoint} was not waited for any longer, after {waited:.3g} s")
        except RPCError as error:
            self._failed(direction, expert, rows, started, error)
            raise
        except trio.Cancelled:
            self._failed(direction, expert, rows, started, CallCancelled("the caller needed the answer no more"))
            raise
        finally:
            self.in_flight -= 1
        self._directory.report_success(expert)
        queue, compute, updates = reply.body
        # One of the steps since then is ours; below 0 where it made none (it accumulates), or began anew.
        staleness = None if seen is None else max(0, updates - 1 - seen)
        self._emit(
            CallFinished(
                uid=expert.uid, address=expert.contact.endpoint, direction=direction, rows=rows,
                seconds=trio.current_time() - started, queue=queue, compute=compute, bytes=reply.bytes,
                updates=updates, staleness=staleness,
            )
        )  # fmt: skip
        return Answer(answer, updates)

    def _failed(self, direction: str, expert: ExpertInfo, rows: int, started: float, error: RPCError) -> None:
        seconds = trio.current_time() - started
        self._directory.report_failure(expert, error, sent=started)
        self._emit(
            CallFailed(
                uid=expert.uid, address=expert.contact.endpoint, direction=direction, rows=rows, seconds=seconds,
                cause=error.cause, detail=str(error),
            )
        )  # fmt: skip


def checked(tensors: Sequence[Tensor], like: Sequence[Like | None], expert: ExpertInfo) -> list[Tensor]:
    """The tensors as these dtypes, if they are finite and of these shapes (None: any). Else raises `BadReply`."""
    if len(tensors) != len(like):
        raise BadReply(f"{expert.uid} answered with {len(tensors)} tensors instead of {len(like)}")
    answer = []
    for tensor, wanted in zip(tensors, like, strict=True):
        if wanted is not None and tuple(tensor.shape) != wanted[0]:
            raise BadReply(f"{expert.uid} answered with shape {list(tensor.shape)} instead of {list(wanted[0])}")
        # Finite only after the cast: what is a number in float64 may be infinite in float32.
        cast = tensor if wanted is None else tensor.to(wanted[1])
        # A finite sum has finite terms, and is much faster to see; but finite terms may have an infinite sum.
        if not tensor.is_floating_point() or not (math.isfinite(cast.sum()) or bool(cast.isfinite().all())):
            raise BadReply(f"{expert.uid} answered with values that are not finite numbers")
        answer.append(cast)
    return answer


def for_the_wire(tensor: Tensor) -> Tensor:
    """On the CPU, and in full precision, which is what experts compute in (a codec may narrow it on the way)."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
