"""The model that all trainers of a run share: each computes on a replica of it and brings its gradients back here.

A batch's way begins and ends here: `trainer.train_step` refreshes its replica first, and applies its gradients last.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from labkit.training.staleness import DelayCompensation, UpdateRule, widened

MAX_FLOAT16 = 65504.0  # the largest number of float16
MAX_FLOAT16_TO_SQUARE = 255.875  # the largest whose square is a number of float16, too


class SharedModel:
    """The model that all trainers train, its optimizer, and how many updates it has had.

    Args:
        model: The model; its parameters change in place.
        optimizer: Made from the model's parameters.
        rule: How gradients become updates; by default as if they were fresh.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rule: UpdateRule | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.updates = 0
        self.rule = rule or UpdateRule()
        self._compensation = DelayCompensation(self.rule.compensation) if self.rule.compensation else None
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._lock = threading.Lock()
        small = self.rule.clip_grad_norm is not None and self.rule.clip_grad_norm <= 255  # what the optimizer gets
        not_squared = small or isinstance(optimizer, torch.optim.SGD)
        self._max_float16 = MAX_FLOAT16 if not_squared else MAX_FLOAT16_TO_SQUARE

    def replica(self) -> nn.Module:
        """A copy for one trainer."""
        with self._lock:
            return copy.deepcopy(self.model)

    @torch.no_grad()
    def refresh(self, replica: nn.Module) -> int:
        """Copy the current parameters and buffers to a replica. Returns how many updates are in them."""
        with self._lock:
            for mine, shared in zip(_tensors(replica), _tensors(self.model), strict=True):
                mine.copy_(shared)
            return self.updates

    def accepts(self, grad: Tensor) -> bool:
        """Whether `apply` may be given this gradient. It has no NaN or infinity, and is not too large for Adam.

        A square that overflows would stay in Adam's running mean of squares, and its parameter would never move again.
        That mean has the gradient's own type. In float16 it can overflow if gradients stay at 256 or more (a single one
        of 300 adds only a thousandth of its square). So these are refused, as a safe bound, for all optimizers but SGD,
        since others may keep squares too, unless gradients are clipped to 255 or less.
        """
        numbers = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
        if numbers.dtype == torch.float16:
            return bool((numbers.abs() <= self._max_float16).all())
        flat = widened(numbers).reshape(-1)
        return bool(torch.isfinite(torch.dot(flat, flat)))

    def apply(self, replica: nn.Module, forward_updates: int) -> int:
        """Take a step with a replica's gradients.

        `forward_updates`: what `refresh` returned before the forward pass. Returns the gradients' staleness, the number
        of updates by others since then.
        """
        with self._lock:
            staleness, rule = self.updates - forward_updates, self.rule
            parameters, replicas = list(self.model.parameters()), list(replica.parameters())
            if self._compensation is not None:
                self._compensation.apply([mine.grad for mine in replicas], parameters, replicas)
                for mine in replicas:
                    if mine.grad is not None and mine.grad.dtype == torch.float16:
                        mine.grad.clamp_(-self._max_float16, self._max_float16)  # no correction goes further
            for shared, mine in zip(parameters, replicas, strict=True):
                shared.grad = mine.grad
            if rule.clip_grad_norm is not None:
                _clip(parameters, rule.clip_grad_norm)
            if rule.changes_rates:  # else they are the caller's own to change
                for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                    group["lr"] = rate * rule.rate(self.updates, staleness)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for shared_buffer, buffer in zip(self.model.buffers(), replica.buffers(), strict=True):
                    shared_buffer.copy_(buffer)  # so running averages are those of the last trainer
            self.updates += 1
            return staleness


def _clip(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Clip like `torch.nn.utils.clip_grad_norm_`, which takes float16 norms above 65504 for infinite and gives 0."""
    grads = [widened(parameter.grad) for parameter in parameters if parameter.grad is not None]
    nn.utils.clip_grads_with_norm_(parameters, max_norm, nn.utils.get_total_norm(grads))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
