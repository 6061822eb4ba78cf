"""How a stale gradient becomes an update: what the literature on asynchronous SGD recommends, as options.

At the end of a batch's way `shared_model` applies the rule under its lock. The staleness of a gradient is the number of
updates that others have made since the parameters that it was computed from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SQUARES_DECAY = 0.95  # share of the running mean of squared gradients that an update keeps
EPSILON = 1e-7  # added to that mean, so that nothing is divided by 0


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """How gradients become updates. By default each gradient is applied as if it were fresh.

    Args:
        warmup: Updates over which the learning rates rise to their values.
        decay_over: The update at which the learning rates reach 0, to which they fall linearly from the end of the
            warm-up; 0 for never.
        clip_grad_norm: Bound on the norm of a gradient, all parameters together; None for no clipping.
        age_power: P, where learning rates are multiplied by (1 + staleness)^-p (Zhang et al. 2016: p = 1).
        compensation: λ of delay compensation with an adaptive λ (Zheng et al. 2017, DC-ASGD-a): the gradient is
            corrected to first order for how far the parameters have moved.

    Raises:
        ValueError: A value is out of its range.
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
            raise ValueError(f"clip_grad_norm={self.clip_grad_norm!r}: a number above 0; leave it out for no bound")
        for name in ("age_power", "compensation"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r}: a finite number of at least 0")

    @property
    def changes_rates(self) -> bool:
        """Whether `rate` ever differs from 1."""
        return bool(self.warmup or self.decay_over or self.age_power)

    def rate(self, updates: int, staleness: int) -> float:
        """The factor of the learning rates for the update that follows `updates`, by a gradient of this staleness."""
        rate = math.pow(1.0 + staleness, -self.age_power)
        if updates < self.warmup:
            rate *= (updates + 1) / self.warmup
        elif self.decay_over:
            rate *= max(0.0, 1 - (updates - self.warmup) / (self.decay_over - self.warmup))
        return rate


def widened(grad: Tensor) -> Tensor:
    """The gradient, in float32 if it is in half precision, so that it can be squared and added up."""
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


class DelayCompensation:
    """Delay compensation: `g + λ g² (current - used)`, with λ divided by the root of the mean squared gradient.

    g² stands for the diagonal of the Hessian. It keeps one number for each number of the parameters.

    Args:
        strength: λ.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._squares: dict[int, Tensor] = {}  # running means, by a parameter's place

    def state_dict(self) -> dict[int, Tensor]:
        """Copies of the running means of squares, by a parameter's place."""
        return {place: mean.clone() for place, mean in self._squares.items()}

    def load_state_dict(self, state: Mapping[int, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        self._squares = {int(place): mean.clone() for place, mean in state.items()}

    @torch.no_grad()
    def apply(self, grads: Sequence[Tensor | None], current: Sequence[Tensor], used: Sequence[Tensor]) -> None:
        """Correct the gradients in place.

        It computes in full precision, since a square that is infinite in half precision, times no movement, is NaN.

        Args:
            grads: One for each parameter, or None.
            current: The parameters as they are now.
            used: The parameters from which the gradients were computed.
        """
        for place, (grad, now, then) in enumerate(zip(grads, current, used, strict=True)):
            if grad is None:
                continue
            wide = widened(grad)
            square = wide * wide
            mean = self._squares.get(place)
            if mean is None:
                mean = self._squares[place] = square.clone()
            else:
                mean.mul_(SQUARES_DECAY).add_(square, alpha=1 - SQUARES_DECAY)
            wide.addcdiv_(square * (widened(now) - widened(then)), (mean + EPSILON).sqrt(), value=self.strength)
            if wide is not grad:
                grad.copy_(wide)
