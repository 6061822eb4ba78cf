"""The model that all trainers of a run share: each computes on a replica of it and brings its gradients back here."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class SharedModel:
    """The model that all trainers train, its optimizer, and how many updates it has had."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, lr_factor: Callable[[int], float] | None = None
    ) -> None:
        """`lr_factor`: what the optimizer's own learning rates are multiplied with, given the updates so far."""
        self.model = model
        self.optimizer = optimizer
        self.updates = 0
        self._lr_factor = lr_factor
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._lock = threading.Lock()

    def replica(self) -> nn.Module:
        """A copy for one trainer."""
        with self._lock:
            return copy.deepcopy(self.model)

    @torch.no_grad()
    def refresh(self, replica: nn.Module) -> int:
        """Give a replica the current parameters and buffers. Returns how many updates are in them."""
        with self._lock:
            for mine, shared in zip(_tensors(replica), _tensors(self.model), strict=True):
                mine.copy_(shared)
            return self.updates

    def apply(self, replica: nn.Module, seen: int) -> int:
        """Step with a replica's gradients. Returns their staleness: updates by others since `seen`."""
        with self._lock:
            for shared, mine in zip(self.model.parameters(), replica.parameters(), strict=True):
                shared.grad = mine.grad
            if self._lr_factor is not None:
                for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                    group["lr"] = rate * self._lr_factor(self.updates)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for shared_buffer, buffer in zip(self.model.buffers(), replica.buffers(), strict=True):
                    shared_buffer.copy_(buffer)  # so of running averages the last trainer's stand
            self.updates += 1
            return self.updates - 1 - seen


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
