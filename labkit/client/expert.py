"""One expert of a swarm as a torch module, for calls without a gate.

Beside the way of a batch through an MoE layer: here the expert is known, and is looked up and called alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from labkit.client.expert_client import ExpertCall, OnDone, for_the_wire
from labkit.client.session import Session, find_session
from labkit.errors import NoExperts
from labkit.expert_uid import parent, split_uid
from labkit.wire.compression import CODECS
from labkit.wire.transport import await_callback


class RemoteExpert(nn.Module):
    """One expert of a swarm, called like any module: `expert(x)`, or `expert(x, y)`.

    Inputs are [rows, ...], the output is [rows, ...]. The expert's parameters stay at its
    server: a backward pass trains them there. A call raises `NoExperts` if no server has the
    expert, a kind of `RPCError` if it fails, and `SwarmClosed` if the swarm is not open.

    Example:
        expert = swarm.expert("ffn.0.3")
        expert(torch.randn(8, 256)).sum().backward()

    Args:
        uid: The expert, such as "ffn.0.3".
        swarm: Name of the swarm, which has to be open when the expert is called. Default
            "default".
        timeout: Seconds that a call may take. Default 10.
        codec: How tensors are compressed on the wire; see `DispatchConfig`. Default "none".

    Raises:
        ValueError: A value cannot be used.
    """

    def __init__(self, uid: str, swarm: str = "default", *, timeout: float = 10.0, codec: str = "none") -> None:
        super().__init__()
        split_uid(uid)
        if not 0 < timeout < math.inf or codec not in CODECS:
            raise ValueError(
                f"timeout={timeout!r}, codec={codec!r}: finite seconds above 0, and one of {', '.join(CODECS)}"
            )
        self.uid = uid
        self.swarm = swarm
        self.timeout = timeout
        self.codec = codec

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the expert: inputs [rows, ...] -> output [rows, ...], on the first input's device."""
        # The empty tensor makes autograd ask for the backward pass even where no input needs a gradient: it trains.
        output: Tensor = _CallExpert.apply(self, torch.zeros(0, requires_grad=True), *inputs)  # type: ignore[no-untyped-call]
        x = inputs[0]
        return output.to(x.device, x.dtype if x.is_floating_point() else output.dtype)

    def extra_repr(self) -> str:
        return f"{self.uid}, swarm={self.swarm!r}"

    async def call(self, session: Session, direction: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Look the expert up and call it, in the lab thread.

        Args:
            session: The calls that layers make.
            direction: "forward" or "backward".
            tensors: The inputs and, in a backward pass, the gradient of the output.

        Returns:
            The output, or the gradients of the floating-point inputs.

        Raises:
            NoExperts: No server has it.
        """
        info = (await session.directory.find([self.uid]))[self.uid]
        if info is None:
            raise NoExperts(f"nobody serves {self.uid}: {await session.directory.explain(parent(self.uid)[0])}")
        options: dict[str, Any] = {"timeout": self.timeout, "codec": self.codec}

        def begin(done: OnDone) -> ExpertCall:
            if direction == "forward":
                return session.experts.forward(info, tensors, None, done, **options)
            return session.experts.backward(info, tensors[:-1], tensors[-1], done, **options)

        return (await await_callback(begin)).tensors


class _CallExpert(torch.autograd.Function):
    """A call of an expert. Its output is on the CPU: see `MixtureOfExperts._ask`."""

    @staticmethod
    def forward(ctx: Any, expert: RemoteExpert, anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.expert, ctx.session = expert, find_session(expert.swarm)
        ctx.save_for_backward(*inputs)
        (output,) = ctx.session.run(expert.call, ctx.session, "forward", [for_the_wire(x) for x in inputs])
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        inputs = ctx.saved_tensors
        tensors = [for_the_wire(x) for x in (*inputs, grad_output)]
        grads = iter(ctx.session.run(ctx.expert.call, ctx.session, "backward", tensors))
        return None, None, *(next(grads).to(x.device, x.dtype) if x.is_floating_point() else None for x in inputs)
