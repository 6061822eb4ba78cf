"""The model that all trainers of a run share: each computes on a replica of it and brings its gradients back here."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from labkit.training.staleness import Compensation, UpdateRule, widened

# Of float16: the largest number, and the largest whose square is one.
LARGEST, LARGEST_TO_SQUARE = 65504.0, 255.875


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
        small = self.rule.clip_grad_norm is not None and self.rule.clip_grad_norm <= 255  # what the optimizer gets
        self._largest = LARGEST if small or isinstance(optimizer, torch.optim.SGD) else LARGEST_TO_SQUARE

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

    def accepts(self, grad: Tensor) -> bool:
        """Whether `apply` takes this gradient: none with NaN or infinity, nor one that is too large for Adam.

        A square that overflows would stay in Adam's running mean of squares, and its parameter would move no more. That
        mean has the gradient's own type. In float16 it can overflow if gradients stay at 256 or more (a single one of
        300 adds but a thousandth of its square), so these are refused, as a safe bound: for all optimizers but SGD,
        since others may keep squares too, unless gradients are clipped to 255 or less.
        """
        numbers = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
        if numbers.dtype == torch.float16:
            return bool((numbers.abs() <= self._largest).all())
        flat = widened(numbers).reshape(-1)
        return bool(torch.isfinite(torch.dot(flat, flat)))

    def apply(self, replica: nn.Module, seen: int) -> int:
        """Step with a replica's gradients. Returns their staleness: updates by others since `seen`."""
        with self._lock:
            age, rule = self.updates - seen, self.rule
            parameters, replicas = list(self.model.parameters()), list(replica.parameters())
            if self._compensation is not None:
                self._compensation.apply([mine.grad for mine in replicas], parameters, replicas)
                for mine in replicas:
                    if mine.grad is not None and mine.grad.dtype == torch.float16:
                        mine.grad.clamp_(-self._largest, self._largest)  # a correction goes no further
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


def _clip(parameters: list[nn.Parameter], most: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, to which norms above 65504 are infinite in float16, so that it gives 0."""
    grads = [widened(parameter.grad) for parameter in parameters if parameter.grad is not None]
    nn.utils.clip_grads_with_norm_(parameters, most, nn.utils.get_total_norm(grads))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
