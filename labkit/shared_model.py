"""The model that all trainers of a run share: each computes on a replica of it and brings its gradients back here."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from labkit.update_rule import Compensation, UpdateRule


class SharedModel:
    """The model that all trainers train, its optimizer, and how many updates it has had."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rule: UpdateRule | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.updates = 0
        self.rule = rule or UpdateRule()
        self._compensation = Compensation(self.rule.compensation) if self.rule.compensation else None
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
            age, rule = self.updates - seen, self.rule
            parameters, replicas = list(self.model.parameters()), list(replica.parameters())
            if self._compensation is not None:
                self._compensation.apply([mine.grad for mine in replicas], parameters, replicas)
            for shared, mine in zip(parameters, replicas, strict=True):
                shared.grad = mine.grad
            if rule.clip_grad_norm is not None:
                _clip(parameters, rule.clip_grad_norm)
            if rule.changes_rates:  # else they are the caller's own to change
                for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                    group["lr"] = rate * rule.rate(self.updates, age)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for shared_buffer, buffer in zip(self.model.buffers(), replica.buffers(), strict=True):
                    shared_buffer.copy_(buffer)  # so of running averages the last trainer's stand
            self.updates += 1
            return age


def square_finite(grad: Tensor) -> bool:
    """Whether the sum of its squares is: of no gradient with NaN or infinity, nor of one that is too large for Adam.

    A square that overflows would stay in Adam's running mean of squares, and its parameter would move no more.
    """
    numbers = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
    flat = _widened(numbers).reshape(-1)
    return bool(torch.isfinite(torch.dot(flat, flat)))


def _clip(parameters: list[nn.Parameter], most: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, to which norms above 65504 are infinite in float16, so that it gives 0."""
    grads = [_widened(parameter.grad) for parameter in parameters if parameter.grad is not None]
    nn.utils.clip_grads_with_norm_(parameters, most, nn.utils.get_total_norm(grads))


def _widened(grad: Tensor) -> Tensor:
    """In a precision in which numbers of half precision can be squared and added up."""
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
