"""The experts that benchmarks call, by the name that `--expert` gives them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

KINDS = {"nop": "nop", "ffn": "ffn", "ffn2": "labkit.bench.experts:TwoLayers"}


class TwoLayers(nn.Module):
    """What the peer calls `ffn`: a third of the parameters, and of the arithmetic, of ours, which is the paper's.

    [rows, hidden] -> the same: hidden -> 4 * hidden -> hidden with GELU, a residual, and LayerNorm.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, 4 * hidden)
        self.outer = nn.Linear(4 * hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(x + self.outer(functional.gelu(self.inner(x), approximate="tanh")))
        return output
