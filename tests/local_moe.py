"""The MoE layer as the paper writes it, computed here: all live experts of every row ranked, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from labkit.expert_uid import split_uid


class LocalMoE(nn.Module):
    """`gate` as in `MixtureOfExperts`; `experts`: live ones, by uid. No grouping by expert, no search, no network.

    `pool`: for a layer over sequences, what the gate sees of one, [seq, dim] and the inputs beside it -> [dim].
    """

    def __init__(
        self, gate: nn.Linear, grid: tuple[int, ...], experts: Mapping[str, nn.Module], k_best: int,
        pool: Callable[..., Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate, self.grid, self.k_best, self.pool = gate, grid, k_best, pool
        self.experts = [(split_uid(uid)[1], module) for uid, module in experts.items()]

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        leading = x.shape[:-1] if self.pool is None else x.shape[:-2]
        inputs = [tensor.reshape(leading.numel(), *tensor.shape[len(leading) :]) for tensor in (x, *others)]
        outputs = torch.stack([self._row(*row) for row in zip(*inputs, strict=True)])
        return outputs.reshape(*leading, *outputs.shape[1:])

    def _row(self, x: Tensor, *others: Tensor) -> Tensor:
        seen = x if self.pool is None else self.pool(x, *others)
        grid_scores = self.gate(seen).split(self.grid)  # [size] for each dimension
        scores = torch.stack([sum(s[c] for s, c in zip(grid_scores, at, strict=True)) for at, _ in self.experts])
        best, chosen = scores.topk(min(self.k_best, len(scores)))
        inputs = [tensor[None] for tensor in (x, *others)]
        outputs = torch.cat([self.experts[e][1](*inputs) for e in chosen.tolist()])  # [k, dim] or [k, seq, dim]
        return torch.einsum("k,k...->...", torch.softmax(best, dim=0), outputs)
