"""How a stale gradient becomes an update: what the literature on asynchronous SGD recommends, as options.

`shared_model` applies the rule under its lock. A gradient's age is its staleness: the updates that others made between
the parameters that it was computed from and now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEEP = 0.95  # of the running mean of squared gradients, per update
TINY = 1e-7


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """Nothing of it by default: each gradient is applied as if it were fresh.

    `warmup`: updates over which the learning rates rise to what they are. `decay_over`: updates over which they fall to
    0, linearly, from the warm-up's end; 0 for never. `clip_grad_norm`: bound on the norm of a gradient, all parameters
    together, or None. `age_power`: p, where learning rates are multiplied by (1 + age)^-p (Zhang et al. 2016: p = 1).
    `compensation`: λ of delay compensation with an adaptive λ (Zheng et al. 2017, DC-ASGD-a): the gradient is corrected
    to first order for how far the parameters have moved. Raises `ValueError`.
    """

    warmup: int = 0
    decay_over: int = 0
    clip_grad_norm: float | None = None
    age_power: float = 0.0
    compensation: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or (self.decay_over and self.decay_over <= self.warmup):
            raise ValueError(f"warmup={self.warmup!r}: at least 0, and less than the updates of the whole run")
        if self.clip_grad_norm is not None and not 0 < self.clip_grad_norm < math.inf:
            raise ValueError(f"clip_grad_norm={self.clip_grad_norm!r}: a positive number, or None for no clipping")
        for name in ("age_power", "compensation"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r}: a finite number of at least 0")

    @property
    def changes_rates(self) -> bool:
        """Whether `rate` is ever another than 1."""
        return bool(self.warmup or self.decay_over or self.age_power)

    def rate(self, updates: int, age: int) -> float:
        """What learning rates are multiplied with for the update that follows `updates`, of a gradient of this age."""
        rate = math.pow(1.0 + age, -self.age_power)
        if updates < self.warmup:
            rate *= (updates + 1) / self.warmup
        elif self.decay_over:
            rate *= max(0.0, 1 - (updates - self.warmup) / (self.decay_over - self.warmup))
        return rate


def widened(grad: Tensor) -> Tensor:
    """In a precision in which numbers of half precision can be squared and added up."""
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


class Compensation:
    """Delay compensation: `g + λ g² (now - seen)`, with λ divided by the root of the mean squared gradient.

    g² stands for the diagonal of the Hessian. Keeps one number for each parameter's.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._squares: dict[int, Tensor] = {}  # running means, by a parameter's place

    @torch.no_grad()
    def apply(self, grads: Sequence[Tensor | None], now: Sequence[Tensor], seen: Sequence[Tensor]) -> None:
        """Correct the gradients in place.

        Computed in full precision, since a square that is infinite in half precision, times no movement, is NaN.
        """
        for place, (grad, current, old) in enumerate(zip(grads, now, seen, strict=True)):
            if grad is None:
                continue
            wide = widened(grad)
            square = wide * wide
            mean = self._squares.get(place)
            if mean is None:
                mean = self._squares[place] = square.clone()
            else:
                mean.mul_(KEEP).add_(square, alpha=1 - KEEP)
            wide.addcdiv_(square * (widened(current) - widened(old)), (mean + TINY).sqrt(), value=self.strength)
            if wide is not grad:
                grad.copy_(wide)
