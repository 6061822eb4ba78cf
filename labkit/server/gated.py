"""The kind "gated": the feed-forward expert of today's mixture models, such as Mixtral, OLMoE or gpt-oss.

One module for all of them, of torch alone: a server needs no `transformers` to serve a model's experts. What they
differ in are options. `integrations/layouts` finds out which, and lays their weights out as here.
"""

# rows: of a batch; hidden: width of input and output; inner: width between

from __future__ import annotations

import math
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
GATES = ("plain", "none", "clamped", "clamped after", "shifted", "softcapped", "float32")
LIMITED = ("clamped", "clamped after", "shifted", "softcapped")  # gates that need a limit
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
        limit: Of the clamped gates and "softcapped": the largest number.
        alpha: Of "shifted": the factor in its sigmoid; of "softcapped": the largest number of up.
        dtype: Of the parameters: "float32" (default), "float64", "float16" or "bfloat16".
        lora: The rank of adapters beside both linear layers, which are then frozen. Default 0:
            none, and all parameters are trained.
        lora_scale: The factor of what the adapters add. Default 1.
    """

    def __init__(
        self, hidden: int, inner: int | None = None, activation: str = "silu", gate: str = "plain",
        bias: bool = False, limit: float | None = None, alpha: float | None = None, dtype: str = "float32",
        lora: int = 0, lora_scale: float = 1.0,
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
        if (limit is None and gate in LIMITED) or (alpha is None and gate in ("shifted", "softcapped")):
            raise ValueError(f"gate={gate!r}, limit={limit!r}, alpha={alpha!r}: it needs a number")
        if not isinstance(lora, int) or isinstance(lora, bool) or not 0 <= lora <= min(hidden, inner):
            raise ValueError(
                f"lora={lora!r}: a rank from 0, for no adapters, to {min(hidden, inner):,}, as wide as it is"
            )
        self.activation, self.gate, self.limit, self.alpha = activation, gate, limit, alpha
        self.takes = f"{dtype} [rows, {hidden}]"
        self.up = nn.Linear(
            hidden, inner if gate == "none" else 2 * inner, bias=bias, dtype=DTYPES[dtype]
        )  # gate first
        self.down = nn.Linear(inner, hidden, bias=bias, dtype=DTYPES[dtype])
        self.up_lora = LowRank(self.up, lora, lora_scale) if lora else None
        self.down_lora = LowRank(self.down, lora, lora_scale) if lora else None

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(x)
        if self.up_lora is not None:
            up = up + self.up_lora(x)
        between = apply_gate(up, self.activation, self.gate, self.limit, self.alpha)
        output: Tensor = self.down(between)
        return output if self.down_lora is None else output + self.down_lora(between)


class LowRank(nn.Module):
    """An adapter, which learns in the place of a linear layer: scale * B A x (LoRA, Hu et al. 2021, section 4.1).

    It adds nothing at first. Where the layer is of half precision, its own parameters are float32, and so is what it
    computes.

    Args:
        layer: The layer, which is frozen.
        rank: Rows of A.
        scale: The factor of what it adds.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        layer.requires_grad_(False)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self.a = nn.Parameter(torch.empty(rank, layer.in_features, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=dtype))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b) * self.scale
        return added.to(x.dtype)


def apply_gate(x: Tensor, activation: str, gate: str, limit: float | None = None, alpha: float | None = None) -> Tensor:
    """What the first linear layer gives -> what the second takes.

    Args:
        x: [rows, 2 * inner], the gate's half first; [rows, inner] without a gate.
        activation: One of `ACTIVATIONS`.
        gate: "plain": activation(gate) * up. "clamped": the same of numbers up to `limit`. "clamped after": the
            activation of the gate is clamped. "shifted": as gpt-oss has it, a clamped gate times the sigmoid of
            `alpha` times itself, times up + 1. "softcapped": sigmoid(gate) times gate and up, which tanh keeps below
            `limit` and `alpha`, in float32. "float32": as "plain", computed in float32. "none": activation(x).
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
    if gate == "softcapped":
        assert alpha is not None
        first, up, dtype = first.float(), up.float(), x.dtype
        return (torch.tanh(first / limit) * limit * torch.sigmoid(first) * (torch.tanh(up / alpha) * alpha)).to(dtype)
    up = up.clamp(-limit, limit)
    if gate == "clamped after":
        return act(first).clamp(max=limit) * up
    first = first.clamp(max=limit)
    if gate == "clamped":
        return act(first) * up
    assert alpha is not None
    return (up + 1) * (first * torch.sigmoid(first * alpha))
