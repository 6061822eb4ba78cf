"""One expert of a swarm as a torch module, for calls without a gate.

Beside the way of a batch through an MoE layer: here the expert is known, and is looked up and called alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trio
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from labkit.client.expert_client import ExpertCall, OnDone, for_the_wire
from labkit.client.following import successor
from labkit.client.frozen import StandIn, are_wanted, stand_ins
from labkit.client.gather import MAX_HALVINGS
from labkit.client.inputs import check_finite, check_tensors
from labkit.client.outside_graphs import outside_graphs
from labkit.client.overload import pause_before
from labkit.client.session import Session, find_session
from labkit.client.sizes import row_bytes
from labkit.errors import (
    ConnectionLost,
    MessageTooLarge,
    NoExperts,
    NonFiniteTensor,
    Overloaded,
    RPCError,
    UnknownExpert,
)
from labkit.expert_protocol import Direction, ExpertSchema
from labkit.expert_uid import ExpertInfo, parent, split_uid
from labkit.suggest import did_you_mean
from labkit.wire.compression import CODECS
from labkit.wire.transport import await_callback


class RemoteExpert(nn.Module):
    """One expert of a swarm, called like any module: `expert(x)`, or `expert(x, y, mask=m)`.

    Inputs are [rows, ...], the output is [rows, ...], or a tuple of such outputs. The
    expert's parameters stay at its server: a backward pass trains them there. A call raises
    `NoExperts` if no server has the expert, a kind of `RPCError` if it fails, and
    `SwarmClosed` if the swarm is not open.

    It has one parameter of no elements, which stands for the expert: where that needs no
    gradient (`requires_grad_(False)`), or where `torch.autograd.grad` asks for others only,
    a backward pass gives the gradients of the inputs and trains nothing.

    Example:
        expert = swarm.expert("ffn.0.3")
        expert(torch.randn(8, 256)).sum().backward()

    Args:
        uid: The expert, such as "ffn.0.3".
        swarm: Name of the swarm, which has to be open when the expert is called. Default
            "default".
        timeout: Seconds that a call may take. Default 10.
        codec: How tensors are compressed on the wire; see `DispatchConfig`. Default "none".
        train_expert: Whether backward passes train the expert. Default None: unless it is
            frozen, as above.

    Raises:
        ValueError: A value cannot be used.
    """

    def __init__(
        self,
        uid: str,
        swarm: str = "default",
        *,
        timeout: float = 10.0,
        codec: str = "none",
        train_expert: bool | None = None,
    ) -> None:
        super().__init__()
        split_uid(uid)
        if not 0 < timeout < math.inf or codec not in CODECS:
            raise ValueError(
                f"timeout={timeout!r}, codec={codec!r}: finite seconds above 0, and one of {', '.join(CODECS)}"
                f"{did_you_mean(codec, CODECS)}"
            )
        if train_expert not in (None, True, False):
            raise ValueError(f"train_expert={train_expert!r}: True, False, or None for unless it is frozen")
        self.uid = uid
        self.swarm = swarm
        self.timeout = timeout
        self.codec = codec
        self.train_expert = train_expert
        self.anchor = nn.Parameter(torch.zeros(0))
        self._answer_bytes = 0  # of a row of the answer, as far as that is known

    @property
    def schema(self) -> ExpertSchema | None:
        """What the expert takes and gives, as its server says; None if the server does not know yet."""
        session = find_session(self.swarm)
        return session.run(self._find_schema, session)

    @outside_graphs
    def forward(self, *inputs: Tensor, **keywords: Tensor) -> Any:
        """Call the expert: [rows, ...] -> [rows, ...], on the first input's device.

        Args:
            *inputs: Each [rows, ...].
            **keywords: Further inputs [rows, ...], which reach the expert by their names.

        Returns:
            The output, or a tuple of outputs where the expert has several.
        """
        tensors = (*inputs, *keywords.values())
        if not tensors:
            raise ValueError(f"the expert {self.uid} is called with one input at least")
        check_tensors(f"the expert {self.uid}", inputs, keywords)
        anchors = stand_ins([self.anchor]) if self.train_expert is None else []
        anchor = anchors[0].empty if anchors else torch.zeros(0, requires_grad=True) if self.train_expert else None
        calling = _Calling(self, find_session(self.swarm), tuple(keywords), anchors)
        outputs = _CallExpert.apply(calling, anchor, *tensors)  # type: ignore[no-untyped-call]
        x = tensors[0]
        moved = tuple(output.to(x.device, x.dtype if x.is_floating_point() else output.dtype) for output in outputs)
        return moved if len(moved) > 1 else moved[0]

    def extra_repr(self) -> str:
        return f"{self.uid}, swarm={self.swarm!r}"

    def _save_to_state_dict(self, *args: Any) -> None:
        pass  # there is nothing to save: the expert is not here

    def _load_from_state_dict(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(  # type: ignore[no-untyped-call]
            {"train_expert": None, "_answer_bytes": 0, **state}
        )
        if "anchor" not in self._parameters:  # of older modules
            self.anchor = nn.Parameter(torch.zeros(0))

    async def _find_schema(self, session: Session) -> ExpertSchema | None:
        return await session.experts.schema(await self._find(session), self.timeout)

    async def _find(self, session: Session) -> ExpertInfo:
        info = (await session.directory.find([self.uid]))[self.uid]
        if info is None:
            name = parent(self.uid)[0]
            before = session.directory.suspended([name]).get(
                self.uid
            )  # its server may be gone, and others go on with it
            if before is not None:
                info = await successor(session.directory, before, trio.current_time() + self.timeout / 2)
            if info is not None:
                return info
            error = NoExperts(f"nobody serves {self.uid}: {await session.directory.explain(name)}")
            error.recoverable = self.uid in session.directory.suspended([name])  # else it is not declared at all
            raise error
        return info

    async def _call(
        self, session: Session, direction: Direction, inputs: Sequence[Tensor], grads: Sequence[Tensor],
        keywords: tuple[str, ...], train: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Look the expert up and call it, in the lab thread. What is too large for a message goes in several.

        Args:
            session: The calls that layers make.
            direction: "forward" or "backward".
            inputs: The inputs.
            grads: In a backward pass, the gradients of the outputs.
            keywords: The names of the last inputs.
            train: In a backward pass, whether the expert learns.

        Returns:
            The outputs, or the gradients of the floating-point inputs.

        Raises:
            NoExperts: No server has it.
        """
        deadline = trio.current_time() + self.timeout
        info = await self._find(session)

        def begin(tensors: Sequence[Tensor], done: OnDone) -> ExpertCall:
            timeout = deadline - trio.current_time()
            if direction == "forward":
                return session.experts.forward(
                    info, tensors, None, done, timeout=timeout, codec=self.codec, keywords=keywords
                )
            return session.experts.backward(
                info, tensors[: len(inputs)], tensors[len(inputs) :], done, timeout=timeout, codec=self.codec,
                keywords=keywords, train=train,
            )  # fmt: skip

        sizes = session.experts.sizes

        async def ask(tensors: Sequence[Tensor], halvings: int = 0) -> list[Tensor]:
            nonlocal info
            rows, each = len(tensors[0]), max(row_bytes(tensors), self._answer_bytes if direction == "forward" else 0)
            most = sizes.most_rows(info.contact, each)
            if rows > most:
                return await in_parts(tensors, most, halvings)
            since, tries = trio.current_time(), 0
            pause: float | None
            while True:
                tries, at = tries + 1, info
                try:
                    answer = await await_callback(partial(begin, tensors))
                    if answer.overflowed is not None:
                        bad = int(answer.overflowed.sum())
                        raise NonFiniteTensor(f"{rows} finite rows gave {self.uid} NaN or infinity in {bad} of them")
                    return list(answer.tensors)
                except (ConnectionLost, UnknownExpert) as error:
                    if info is at:  # else another part of the same call has found it
                        changed = direction == "backward" and isinstance(error, ConnectionLost)
                        found = await successor(session.directory, at, deadline, anew=changed)
                        if found is None:
                            raise
                        info = found if info is at else info
                    pause = None
                except Overloaded:
                    pause = pause_before(tries, since, trio.current_time(), deadline, self.uid)
                    if pause is None:
                        raise
                except MessageTooLarge:
                    if rows == 1 or halvings == MAX_HALVINGS:
                        raise
                    sizes.refused(info.contact, rows * each)
                    return await in_parts(tensors, -(-rows // 2), halvings + 1)
                await trio.sleep(pause or 0.0)

        async def in_parts(tensors: Sequence[Tensor], most: int, halvings: int) -> list[Tensor]:
            parts = list(zip(*(torch.split(tensor, most) for tensor in tensors), strict=True))
            answers: list[list[Tensor]] = [[] for _ in parts]
            failure: RPCError | None = None

            async def ask_part(i: int) -> None:
                nonlocal failure
                try:
                    answers[i] = await ask(parts[i], halvings)
                except RPCError as error:
                    failure = error
                    nursery.cancel_scope.cancel()

            async with trio.open_nursery() as nursery:
                for i in range(len(parts)):
                    nursery.start_soon(ask_part, i)
            if failure is not None:
                raise failure
            return [torch.cat(column) for column in zip(*answers, strict=True)]

        answer = await ask([*inputs, *grads])
        if direction == "forward":
            self._answer_bytes = row_bytes(answer)
        return answer


@dataclass
class _Calling:
    """What the backward pass needs to know of the forward pass, beside tensors."""

    expert: RemoteExpert
    session: Session
    keywords: tuple[str, ...]
    anchors: list[StandIn]  # for the expert's own parameter, where that decides whether the expert is trained

    def run(self, direction: Direction, inputs: Sequence[Tensor], grads: Sequence[Tensor], train: bool) -> list[Tensor]:
        local = [for_the_wire(x) for x in inputs], [for_the_wire(grad) for grad in grads]
        check_finite(self.expert.uid, "inputs", local[0])
        check_finite(self.expert.uid, "output gradients", local[1])
        return self.session.run(self.expert._call, self.session, direction, *local, self.keywords, train)


class _CallExpert(torch.autograd.Function):
    """A call of an expert. Its outputs are on the CPU: see `MixtureOfExperts._ask`."""

    @staticmethod
    def forward(ctx: Any, calling: _Calling, anchor: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.calling = calling
        ctx.no_gradient = None if anchor is None else torch.zeros_like(anchor)  # on its device
        ctx.save_for_backward(*inputs)
        return tuple(calling.run("forward", inputs, (), train=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        inputs, calling, train = ctx.saved_tensors, ctx.calling, ctx.calling.expert.train_expert
        train = are_wanted(calling.anchors) if train is None else train
        anchor = ctx.no_gradient if ctx.needs_input_grad[1] else None
        if not train and not any(ctx.needs_input_grad[2:]):
            return None, anchor, *(None for _ in inputs)
        grads = iter(calling.run("backward", inputs, grad_outputs, train))
        return None, anchor, *(next(grads).to(x.device, x.dtype) if x.is_floating_point() else None for x in inputs)
