"""The kind "gated": the feed-forward expert of today's mixture models, such as Mixtral, OLMoE or gpt-oss.

One module for all of them, of torch alone: a server needs no `transformers` to serve a model's experts. What they
differ in are options. `integrations/layouts` finds out which, and lays their weights out as here.
"""

# rows: of a batch; hidden: width of input and output; inner: width between

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.suggest import one_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
GATES = ("plain", "none", "clamped", "clamped after", "shifted", "float32")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Gated(nn.Module):
    """The kind "gated", an expert of a mixture model: down(activation(gate(x)) * up(x)).

    Input [rows, hidden] -> output [rows, hidden].

    Args:
        hidden: Width of input and output.
        inner: Width between; by default 4 * hidden.
        activation: "silu" (default), "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared",
            "sigmoid" or "tanh".
        gate: How gate and up become one: "plain" (default), or as `apply_gate` says. "none":
            there is no gate, but down(activation(up(x))).
        bias: Whether the linear layers have one.
        limit: Of the clamped gates: the largest number.
        alpha: Of "shifted": the factor in its sigmoid.
        dtype: Of the parameters: "float32" (default), "float64", "float16" or "bfloat16".
    """

    def __init__(
        self, hidden: int, inner: int | None = None, activation: str = "silu", gate: str = "plain",
        bias: bool = False, limit: float | None = None, alpha: float | None = None, dtype: str = "float32",
    ) -> None:  # fmt: skip
        super().__init__()
        inner = 4 * hidden if inner is None else inner
        if not all(isinstance(size, int) and 1 <= size <= 1 << 20 for size in (hidden, inner)):
            raise ValueError(f"hidden={hidden!r}, inner={inner!r}: whole numbers from 1 to {1 << 20:,}")
        if activation not in ACTIVATIONS:
            raise ValueError(one_of("activation", activation, ACTIVATIONS))
        if gate not in GATES:
            raise ValueError(one_of("gate", gate, GATES))
        if dtype not in DTYPES:
            raise ValueError(one_of("dtype", dtype, DTYPES))
        if (limit is None and gate in ("clamped", "clamped after", "shifted")) or (alpha is None and gate == "shifted"):
            raise ValueError(f"gate={gate!r}, limit={limit!r}, alpha={alpha!r}: it needs a number")
        self.activation, self.gate, self.limit, self.alpha = activation, gate, limit, alpha
        self.takes = f"{dtype} [rows, {hidden}]"
        self.up = nn.Linear(
            hidden, inner if gate == "none" else 2 * inner, bias=bias, dtype=DTYPES[dtype]
        )  # gate first
        self.down = nn.Linear(inner, hidden, bias=bias, dtype=DTYPES[dtype])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(apply_gate(self.up(x), self.activation, self.gate, self.limit, self.alpha))
        return output


def apply_gate(x: Tensor, activation: str, gate: str, limit: float | None = None, alpha: float | None = None) -> Tensor:
    """What the first linear layer gives -> what the second takes.

    Args:
        x: [rows, 2 * inner], the gate's half first; [rows, inner] without a gate.
        activation: One of `ACTIVATIONS`.
        gate: "plain": activation(gate) * up. "clamped": the same of numbers up to `limit`. "clamped after": the
            activation of the gate is clamped. "shifted": as gpt-oss has it, a clamped gate times the sigmoid of
            `alpha` times itself, times up + 1. "float32": as "plain", computed in float32. "none": activation(x).
        limit: See `gate`.
        alpha: See `gate`.
    """
    act = ACTIVATIONS[activation]
    if gate == "none":
        return act(x)
    first, up = x.chunk(2, dim=-1)
    if gate == "plain":
        return act(first) * up
    if gate == "float32":
        return (act(first.float()) * up.float()).to(x.dtype)
    assert limit is not None
    up = up.clamp(-limit, limit)
    if gate == "clamped after":
        return act(first).clamp(max=limit) * up
    first = first.clamp(max=limit)
    if gate == "clamped":
        return act(first) * up
    assert alpha is not None
    return (up + 1) * (first * torch.sigmoid(first * alpha))
