"""Calling experts: one request to one expert, reported as an event, and to the directory, however it ends.

On a batch's way: `client/dispatch` decides who is asked for which rows; this asks. No task waits for an answer: who
wants it is called back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from labkit.wire.rpc_types import BULK, Caller, Reply

Like = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of an answer
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # a server's word: one that cannot be is a `BadReply`
Updates = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Figures(msgspec.Struct, array_like=True):
    """What a server says beside the tensors: seconds in its queue and in the batch, optimizer steps it has made."""

    queue: Seconds
    compute: Seconds
    updates: Updates


@dataclass(frozen=True, slots=True)
class ExpertOutput:
    """What an expert answered. `updates`: optimizer steps that it had made."""

    tensors: Sequence[Tensor]
    updates: int


Outcome = ExpertOutput | RPCError
OnDone = Callable[[Outcome], object]


class ExpertClient:
    """Calls experts. Failures are told to the directory, so that a lost server is not asked again.

    `in_flight`: calls under way; changed in the lab thread only, and read from anywhere.
    """

    def __init__(self, caller: Caller, directory: Directory, emit: Emit = ignore) -> None:
        self.in_flight = 0
        self.caller = caller
        self.directory = directory
        self.emit = emit

    def forward(
        self,
        expert: ExpertInfo,
        inputs: Sequence[Tensor],
        output_shape: tuple[int, ...] | None,
        done: OnDone,
        **how: Any,
    ) -> ExpertCall:
        """Inputs [rows, ...] -> one output [rows, *output_shape] of the first's dtype (None: of any shape and dtype).

        `done` is told the answer, or a kind of `RPCError`: `BadReply` for an answer of another shape, or with NaN or
        infinity. Once, in the lab thread, perhaps before this returns. `how`: see `ExpertCall`.
        """
        like = None if output_shape is None else ((len(inputs[0]), *output_shape), inputs[0].dtype)
        return ExpertCall(self, "forward", expert, inputs, [like], done, **how)

    def backward(
        self, expert: ExpertInfo, inputs: Sequence[Tensor], grad_output: Tensor, done: OnDone, **how: Any
    ) -> ExpertCall:
        """Inputs and output gradient -> gradients of the floating-point inputs, in their order. Else as `forward`."""
        like = [(tuple(tensor.shape), tensor.dtype) for tensor in inputs if tensor.is_floating_point()]
        return ExpertCall(self, "backward", expert, [*inputs, grad_output], like, done, **how)


class ExpertCall:
    """One request to one expert, under way from the beginning, for at most `timeout` seconds.

    `seen`: for a backward pass, the `updates` that the expert answered in the forward pass of these rows.
    """

    __slots__ = ("_call", "_client", "_direction", "_done", "_expert", "_like", "_over", "_rows", "_seen", "_started")

    def __init__(
        self,
        client: ExpertClient,
        direction: str,
        expert: ExpertInfo,
        tensors: Sequence[Tensor],
        like: Sequence[Like | None],
        done: OnDone,
        *,
        timeout: float,
        codec: str = "none",
        seen: int | None = None,
    ) -> None:
        self._client = client
        self._direction = direction
        self._expert = expert
        self._rows = tensors[0].shape[0]
        self._like = like
        self._done = done
        self._seen = seen
        self._started = trio.current_time()
        self._over = False
        client.in_flight += 1
        try:
            self._call = client.caller.begin(
                expert.contact, f"expert.{direction}", [expert.uid, seen], tensors, done=self._hear, returns=Figures,
                timeout=timeout, lane=BULK, codec=codec,
            )  # fmt: skip
        except BaseException:
            client.in_flight -= 1
            raise

    def give_up(self) -> None:
        """Wait no longer, which counts as a timeout of the expert. Does nothing when it is over."""
        if not self._over:
            self._call.cancel()
            waited = trio.current_time() - self._started
            self._fail(
                DeadlineExceeded(f"{self._expert.contact.endpoint} was not waited for any longer, after {waited:.3g} s")
            )

    def cancel(self) -> None:
        """The answer is needed no more, and nobody is told of it. Does nothing when it is over."""
        if not self._over:
            self._call.cancel()
            self._done = lambda outcome: None
            self._fail(CallCancelled("the caller needed the answer no more"))

    def _hear(self, reply: Reply | RPCError) -> None:
        if isinstance(reply, RPCError):
            self._fail(reply)
            return
        try:
            answer = checked(reply.tensors, self._like, self._expert)
        except RPCError as error:
            self._fail(error)
            return
        except Exception as error:  # as in `Call.hear`
            self._fail(BadReply(f"{self._expert.uid} sent an answer that cannot be used: {error!r}"))
            return
        self._end()
        client, expert, seen = self._client, self._expert, self._seen
        client.directory.report_success(expert)
        figures = reply.body
        # One of the steps since then is ours; below 0 where it made none (it accumulates), or began anew.
        staleness = None if seen is None else max(0, figures.updates - 1 - seen)
        client.emit(
            CallFinished(
                uid=expert.uid, address=expert.contact.endpoint, direction=self._direction, rows=self._rows,
                seconds=trio.current_time() - self._started, queue=figures.queue, compute=figures.compute,
                bytes=reply.bytes, updates=figures.updates, staleness=staleness,
            )
        )  # fmt: skip
        self._done(ExpertOutput(answer, figures.updates))

    def _fail(self, error: RPCError) -> None:
        self._end()
        client, expert = self._client, self._expert
        client.directory.report_failure(expert, error, sent=self._started)
        client.emit(
            CallFailed(
                uid=expert.uid, address=expert.contact.endpoint, direction=self._direction, rows=self._rows,
                seconds=trio.current_time() - self._started, cause=error.cause, detail=str(error),
            )
        )  # fmt: skip
        self._done(error.with_traceback(None))  # which would keep the batch alive

    def _end(self) -> None:
        self._over = True
        self._client.in_flight -= 1


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
