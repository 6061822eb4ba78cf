"""Calling experts: one request to one expert, reported as an event, and to the directory, however it ends.

On a batch's way: `client/dispatch` decides which expert gets which rows; here it is called. No task waits for an
answer: it goes to a callback, `done`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import trio
from torch import Tensor

from labkit.client.patience import Latencies
from labkit.client.sizes import MessageSizes
from labkit.directory import Directory
from labkit.directory.second_look import LOOK_TIME
from labkit.errors import (
    BadReply,
    CallCancelled,
    ConnectionLost,
    DeadlineExceeded,
    RPCError,
    UnknownExpert,
)
from labkit.events import CallFailed, CallFinished, Emit, ignore
from labkit.expert_protocol import (
    MAX_TENSORS,
    METHODS,
    SCHEMA,
    Direction,
    ExpertReply,
    ExpertRequest,
    ExpertSchema,
)
from labkit.expert_uid import ExpertInfo
from labkit.wire.rpc_types import BULK, Caller, Reply, RPCLimits

MAX_HOPS = 3  # from server to server, after an expert that has moved
ShapeAndType = tuple[tuple[int, ...], torch.dtype]  # that a tensor of an answer is to have


@dataclass(frozen=True, slots=True)
class ExpertOutput:
    """What an expert answered.

    Args:
        tensors: Each [rows, ...], 0 in rows that overflowed.
        updates: Optimizer steps that it had made by then.
        overflowed: Bool [rows], which rows gave it NaN or infinity; None if none did.
    """

    tensors: Sequence[Tensor]
    updates: int
    overflowed: Tensor | None = None


Outcome = ExpertOutput | RPCError
OnDone = Callable[[Outcome], object]


class ExpertClient:
    """Calls experts. It reports failures to the directory, so that a lost server is not asked again.

    `in_flight` is the number of calls under way. It changes in the lab thread only, and any thread may read it.

    Args:
        caller: Sends the requests.
        directory: Gets reports of successes and failures.
        emit: Gets a `CallFinished` or `CallFailed` for each call.
    """

    def __init__(self, caller: Caller, directory: Directory, emit: Emit = ignore) -> None:
        self.in_flight = 0
        self.caller = caller
        self.directory = directory
        self.emit = emit
        limits = getattr(caller, "limits", None) or RPCLimits()
        self.sizes = MessageSizes(limits.frames.message_bytes)
        self.latencies = Latencies()

    def forward(
        self,
        expert: ExpertInfo,
        inputs: Sequence[Tensor],
        output_shapes: Sequence[tuple[int, ...]] | None,
        done: OnDone,
        **options: Any,
    ) -> ExpertCall:
        """Begin a forward call.

        Args:
            expert: The expert, and where it lives.
            inputs: Each [rows, ...].
            output_shapes: The answer is to have one tensor [rows, *shape] for each of these, of the first input's
                dtype; None accepts tensors of any number, shape and dtype.
            done: Called once with the answer or a kind of `RPCError`, in the lab thread, perhaps before this returns.
                The error is `BadReply` for an answer of another shape, or with NaN or infinity in all rows.
            **options: `timeout`, `codec` and `keywords`; see `ExpertCall`.
        """
        rows, dtype = len(inputs[0]), inputs[0].dtype
        expected = None if output_shapes is None else [((rows, *shape), dtype) for shape in output_shapes]
        return ExpertCall(self, "forward", expert, inputs, expected, done, **options)

    def backward(
        self, expert: ExpertInfo, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], done: OnDone, **options: Any
    ) -> ExpertCall:
        """Begin a backward call, which trains the expert, unless `train` is False.

        Args:
            expert: The expert, and where it lives.
            inputs: Those of the forward call, each [rows, ...].
            grad_outputs: The gradients of its outputs, each [rows, ...].
            done: Called as in `forward`. The answer has the gradients of the floating-point inputs, in their order.
            **options: `timeout`, `codec`, `keywords`, `forward_updates` and `train`; see `ExpertCall`.
        """
        expected = [(tuple(tensor.shape), tensor.dtype) for tensor in inputs if tensor.is_floating_point()]
        return ExpertCall(
            self, "backward", expert, [*inputs, *grad_outputs], expected, done, outputs=len(grad_outputs), **options
        )

    async def schema(self, expert: ExpertInfo, timeout: float) -> ExpertSchema | None:
        """What an expert takes and gives, as its server says; None if that is not known. Raises `RPCError`."""
        request = ExpertRequest(expert.uid)
        returns = ExpertSchema | None
        reply = await self.caller.call(expert.contact, SCHEMA, request, returns=returns, timeout=timeout)
        schema: ExpertSchema | None = reply.body
        return schema


class ExpertCall:
    """A call to an expert that is under way, from when it is made until `done` has been called.

    Where the expert has moved to another server, it is called there, within the same deadline, as if it had been there
    all the time.

    Args:
        client: Counts the call, and has what it needs.
        direction: "forward" or "backward".
        expert: The expert, and where it lives.
        tensors: The inputs and, for a backward call, the output gradients behind them; each [rows, ...].
        expected: Shape and dtype of each tensor of the answer; None for any.
        done: Called once with the answer or a kind of `RPCError`.
        timeout: Seconds until the call fails.
        codec: How to compress the tensors on the wire.
        keywords: The names of the last inputs, which the expert gets by keyword.
        outputs: For a backward call, how many of the tensors are gradients of outputs.
        forward_updates: For a backward call, the `updates` with which the forward call of these rows was answered.
        train: For a backward call, whether it trains the expert.
    """

    __slots__ = (
        "_call", "_client", "_codec", "_deadline", "_direction", "_done", "_ended", "_expected", "_expert",
        "_forward_updates", "_hops", "_request", "_rows", "_started", "_tensors",
    )  # fmt: skip

    def __init__(
        self,
        client: ExpertClient,
        direction: Direction,
        expert: ExpertInfo,
        tensors: Sequence[Tensor],
        expected: Sequence[ShapeAndType] | None,
        done: OnDone,
        *,
        timeout: float,
        codec: str = "none",
        keywords: tuple[str, ...] = (),
        outputs: int = 1,
        forward_updates: int | None = None,
        train: bool = True,
    ) -> None:
        self._client = client
        self._direction = direction
        if direction == "backward":  # seconds may have passed since the expert was looked up
            expert = client.directory.newest(expert)
        self._expert = expert
        self._rows = tensors[0].shape[0]
        self._expected = expected
        self._done = done
        self._forward_updates = forward_updates if train else None  # no step of ours: nothing is stale
        self._started = trio.current_time()
        self._deadline = self._started + timeout
        self._ended = False
        self._hops = 0
        # Kept until the end, since the expert may have moved, and is then called again where it is now.
        self._request = ExpertRequest(expert.uid, forward_updates, outputs, keywords, train, expert.epoch)
        self._tensors, self._codec = tensors, codec
        client.in_flight += 1
        try:
            self._begin(timeout)
        except BaseException:
            client.in_flight -= 1
            raise

    def _begin(self, timeout: float) -> None:
        hops = self._hops
        call = self._client.caller.begin(
            self._expert.contact, METHODS[self._direction], self._request, self._tensors,
            done=self._on_reply, returns=ExpertReply, timeout=timeout, lane=BULK, codec=self._codec,
        )  # fmt: skip
        if self._hops == hops:  # else it was answered at once, and called elsewhere
            self._call = call

    def time_out(self) -> None:
        """Wait no longer: the call fails, and counts as a timeout of the expert. Does nothing if it has ended."""
        if not self._ended:
            self._call.cancel()
            waited = trio.current_time() - self._started
            self._fail(
                DeadlineExceeded(f"{self._expert.contact.endpoint} was not waited for any longer, after {waited:.3g} s")
            )

    def cancel(self) -> None:
        """End the call without calling `done`: the answer is not needed any more. Does nothing if it has ended."""
        if not self._ended:
            self._call.cancel()
            self._done = lambda outcome: None
            self._fail(CallCancelled("the caller needed the answer no more"))

    def _on_reply(self, reply: Reply | RPCError) -> None:
        if isinstance(reply, RPCError):
            if not (isinstance(reply, ConnectionLost) and self._look_again(reply)):
                self._fail(reply)
            return
        if reply.body.moved is not None:
            self._follow(reply.body)
            return
        try:
            answer, overflowed = check_answer(reply.tensors, self._expected, self._expert)
        except RPCError as error:
            self._fail(error)
            return
        except Exception as error:  # a peer's answer must not break the reader of all answers
            self._fail(BadReply(f"{self._expert.uid} sent an answer that cannot be used: {error!r}"))
            return
        self._end()
        client, expert, forward_updates = self._client, self._expert, self._forward_updates
        body: ExpertReply = reply.body
        client.directory.report_success(expert)
        if body.leaving:
            client.directory.report_leaving(expert)
        # One of the steps since then is ours. The difference is below 0 if the expert made no step, since it
        # accumulates gradients, or if it has begun anew.
        staleness = None if forward_updates is None else max(0, body.updates - 1 - forward_updates)
        client.emit(
            CallFinished(
                uid=expert.uid, address=expert.contact.endpoint, direction=self._direction, rows=self._rows,
                seconds=trio.current_time() - self._started, queue=body.queue_seconds,
                compute=body.compute_seconds, bytes=reply.bytes, updates=body.updates, staleness=staleness,
            )
        )  # fmt: skip
        self._done(ExpertOutput(answer, body.updates, overflowed))

    def _follow(self, reply: ExpertReply) -> None:
        """Ask where the expert is now, within the same deadline."""
        expert, to = self._expert, reply.moved
        assert to is not None
        self._hops += 1
        if not to.is_safe:
            self._fail(BadReply(f"{expert.uid} is said to have moved to {to.endpoint}, which does not encrypt"))
        elif to.key == expert.contact.key or self._hops > MAX_HOPS:
            self._fail(BadReply(f"{expert.uid} is said to have moved again and again, at last to {to.endpoint}"))
        elif reply.epoch < expert.epoch:
            where = f"{expert.contact.endpoint} knows only where {expert.uid} was"
            self._fail(UnknownExpert(f"{where} in epoch {reply.epoch}, and epoch {expert.epoch} is known"))
        else:
            now = ExpertInfo(expert.uid, to, epoch=reply.epoch)
            self._begin_at(self._client.directory.report_moved(expert, now))

    def _look_again(self, error: RPCError) -> bool:
        """Look whether the expert was handed over before its server left. Returns whether somebody does."""

        def on_found(now: ExpertInfo | None) -> None:
            if self._ended:
                return
            if now is None:
                self._fail(error)
                return
            self._hops += 1
            self._begin_at(now)

        if self._hops >= MAX_HOPS or self._deadline - trio.current_time() < LOOK_TIME:
            return False
        return self._client.directory.look_again(self._expert, on_found)

    def _begin_at(self, expert: ExpertInfo) -> None:
        self._expert = expert
        self._request.epoch = expert.epoch
        try:
            self._begin(max(0.0, self._deadline - trio.current_time()))
        except Exception as error:  # which must not break the reader of all answers
            self._fail(BadReply(f"{expert.uid} could not be called at {expert.contact.endpoint}: {error!r}"))

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
        self._ended = True
        self._tensors = ()
        self._client.in_flight -= 1


def check_answer(
    tensors: Sequence[Tensor], expected: Sequence[ShapeAndType] | None, expert: ExpertInfo
) -> tuple[list[Tensor], Tensor | None]:
    """The tensors of an answer, cast to the expected dtypes, and its rows that are not finite, as in `ExpertOutput`.

    Raises `BadReply` if they are not of the expected shapes (None: any), or if no row is finite.
    """
    if expected is not None and len(tensors) != len(expected):
        raise _misfit(f"{expert.uid} answered with {len(tensors)} tensors instead of {len(expected)}")
    if not 0 < len(tensors) <= MAX_TENSORS and expected is None:
        raise _misfit(f"{expert.uid} answered with {len(tensors)} tensors; expected are 1 to {MAX_TENSORS}")
    answer: list[Tensor] = []
    overflowed: Tensor | None = None
    wanted_by_place: Sequence[ShapeAndType | None] = [None] * len(tensors) if expected is None else expected
    for tensor, wanted in zip(tensors, wanted_by_place, strict=True):
        if wanted is not None and tuple(tensor.shape) != wanted[0]:
            raise _misfit(f"{expert.uid} answered with shape {list(tensor.shape)} instead of {list(wanted[0])}")
        if not tensor.is_floating_point():
            raise _misfit(f"{expert.uid} answered with {tensor.dtype}, which has no gradient; floating-point is needed")
        # Finite only after the cast: what is a number in float64 may be infinite in float32.
        cast = tensor if wanted is None else tensor.to(wanted[1])
        # A finite sum has finite terms, and is much faster to see; but finite terms may have an infinite sum.
        if not (math.isfinite(cast.sum()) or bool(cast.isfinite().all())):
            bad = ~cast.isfinite().reshape(len(cast), -1).all(1) if cast.ndim else torch.ones(1, dtype=torch.bool)
            overflowed = bad if overflowed is None else overflowed | bad
        answer.append(cast)
    if overflowed is not None:
        if overflowed.all():
            raise BadReply(f"{expert.uid} answered with values that are not finite numbers")
        answer = [tensor.index_fill(0, overflowed.nonzero()[:, 0], 0) for tensor in answer]
    return answer, overflowed


def _misfit(text: str) -> BadReply:
    """The error for an answer of another form than expected, which the expert will give every time."""
    error = BadReply(text)
    error.recoverable = False
    return error


def for_the_wire(tensor: Tensor) -> Tensor:
    """The tensor on the CPU and in full precision, in which experts compute (a codec may narrow it on the way)."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
