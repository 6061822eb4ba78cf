"""The MoE layer as the paper writes it, computed here: all live experts of every row ranked, one row at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from labkit.expert_uid import split_uid


class LocalMoE(nn.Module):
    """`gate` as in `MixtureOfExperts`; `experts`: live ones, by uid. No grouping by expert, no search, no network."""

    def __init__(self, gate: nn.Linear, grid: tuple[int, ...], experts: Mapping[str, nn.Module], k_best: int) -> None:
        super().__init__()
        self.gate, self.grid, self.k_best = gate, grid, k_best
        self.experts = [(split_uid(uid)[1], module) for uid, module in experts.items()]

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        leading = x.shape[:-1]
        inputs = [tensor.reshape(leading.numel(), *tensor.shape[len(leading) :]) for tensor in (x, *others)]
        return torch.stack([self._row(*row) for row in zip(*inputs, strict=True)]).reshape(*leading, -1)

    def _row(self, x: Tensor, *others: Tensor) -> Tensor:
        grid_scores = self.gate(x).split(self.grid)  # [size] for each dimension
        scores = torch.stack([sum(s[c] for s, c in zip(grid_scores, at, strict=True)) for at, _ in self.experts])
        best, chosen = scores.topk(min(self.k_best, len(scores)))
        inputs = [tensor[None] for tensor in (x, *others)]
        outputs = torch.cat([self.experts[e][1](*inputs) for e in chosen.tolist()])  # [k, dim]
        return torch.softmax(best, dim=0) @ outputs
