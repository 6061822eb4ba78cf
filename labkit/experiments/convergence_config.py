"""The settings of a run in virtual time: its model, its network, its optimizers.

`convergence` and `language_model` differ in what they train on; a run of either is done by `virtual_training`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from labkit.client.dispatch import DispatchConfig
from labkit.expert_uid import check_grid
from labkit.server.optimizer import BackendConfig
from labkit.training.staleness import UpdateRule
from labkit.training.trainer import SCHEDULES

TIMEOUT_IN_DELAYS = 12  # timeout of a pass in mean delays; half of it once k_min have answered: 0.25 % are later
MIN_TIMEOUT = 10.0  # seconds
MAX_LOSS = 0.9  # share of calls
INTEGER_MINIMUMS = {
    "layers": 1, "k_best": 1, "width": 1, "trainers": 1, "batch_size": 1, "updates": 1, "evaluate_every": 1,
    "accumulate": 1, "warmup": 0, "validation": 0,
}  # fmt: skip
"""Fields of a config that are whole numbers, and the minimum of each."""


@dataclass(frozen=True)
class ConvergenceConfig:
    """One run. The settings of the optimizer hold for the trunk and for the experts, which make their share of updates.

    Args:
        model: "dmoe", or "dense": a network without experts, whose trainers wait as long as those of a mixture, once
            per layer and direction.
        grid: Size of each layer's grid of experts in each dimension.
        layers: Layers of experts, or dense blocks.
        k_best: Experts per row.
        width: Width of a row between layers. An expert is width -> 4 width -> 4 width -> width; a dense block is twice
            as wide.
        trainers: Trainers at the same time.
        batch_size: Samples per batch.
        updates: Updates of the trunk, after which the run ends.
        evaluate_every: Updates from one evaluation to the next; there is always one at the end.
        latency: Mean of the exponential delay of a call, in virtual seconds.
        loss: Share of calls that fail, at most 0.9.
        lr: Learning rate.
        beta1: Adam's decay of the first moment.
        accumulate: Backward calls from one update of an expert to the next.
        schedule: "constant", or "linear" for a learning rate that falls to 0.
        warmup: Updates during which the learning rate rises.
        clip_grad_norm: Largest norm of a gradient; None for no clipping.
        age_power: Steps are multiplied by (1 + staleness) ** -age_power; see `UpdateRule`.
        compensation: How strongly stale gradients of the trunk are corrected (DC-ASGD); see `UpdateRule`.
        validation: Training samples that are held out. The run is evaluated on them instead of the test set, for the
            choice of settings.
        seed: Of everything random.
        device: Where trunk and experts compute, such as "cpu" or "cuda".

    Raises:
        ValueError: A value is not possible.
    """

    model: str = "dmoe"
    grid: tuple[int, ...] = (4, 4)
    layers: int = 4
    k_best: int = 4
    width: int = 64
    trainers: int = 64
    batch_size: int = 4
    updates: int = 20 * 1024
    evaluate_every: int = 1024
    latency: float = 1.0
    loss: float = 0.0
    lr: float = 1e-3
    beta1: float = 0.9
    accumulate: int = 1
    schedule: str = "constant"
    warmup: int = 0
    clip_grad_norm: float | None = None
    age_power: float = 0.0
    compensation: float = 0.0
    validation: int = 0
    seed: int = 1337
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if self.model not in ("dmoe", "dense"):
            raise ValueError(f"model={self.model!r}: dmoe or dense")
        for name, least in INTEGER_MINIMUMS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number of at least {least}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: a whole number")
        for name in ("latency", "loss", "beta1", "age_power", "compensation"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: a finite number of at least 0")
        if self.evaluate_every > self.updates:
            raise ValueError(f"evaluate_every={self.evaluate_every}: at most updates={self.updates}, the whole run")
        if self.k_best > math.prod(self.grid):
            raise ValueError(f"k_best={self.k_best}: the grid {self.grid} has {math.prod(self.grid)} experts")
        if self.loss > MAX_LOSS:
            raise ValueError(f"loss={self.loss}: a share of {MAX_LOSS} at most, or no batch gets through")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: one of {', '.join(SCHEDULES)}")
        if not _is_device(self.device):
            raise ValueError(f"device={self.device!r}: what torch calls a device, such as cpu or cuda")
        self.update_rule()
        if self.schedule == "linear" and self._expert_steps(self.warmup) >= max(1, self._expert_steps(self.updates)):
            raise ValueError(
                f"warmup={self.warmup}: too many of updates={self.updates}; an expert makes fewer steps "
                f"({self._expert_steps(self.updates)}), and would have none left after its warm-up"
            )
        self.backend()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ConvergenceConfig:
        """Make a config of its fields as read from JSON."""
        return cls(**{**fields, "grid": tuple(fields["grid"])})

    @property
    def rows(self) -> int:
        """Rows of a batch, each of which goes to `k_best` experts."""
        return self.batch_size

    def expert(self) -> tuple[str, dict[str, Any]]:
        """The kind of the experts, and their options."""
        return "ffn", {"hidden": self.width}

    def dispatch(self) -> DispatchConfig:
        """How layers call experts: they wait so long that few answers come too late."""
        wait = max(MIN_TIMEOUT, TIMEOUT_IN_DELAYS * self.latency)
        return DispatchConfig(
            k_best=self.k_best, forward_timeout=wait, backward_timeout=wait, timeout_after_k_min=wait / 2
        )

    def update_rule(self) -> UpdateRule:
        """How the trunk is updated."""
        decay_over = self.updates if self.schedule == "linear" else 0
        return UpdateRule(self.warmup, decay_over, self.clip_grad_norm, self.age_power, self.compensation)

    def backend(self) -> BackendConfig:
        """How experts are updated."""
        return BackendConfig(
            lr=self.lr, beta1=self.beta1, amsgrad=True, clip_grad_norm=self.clip_grad_norm, schedule=self.schedule,
            accumulate=self.accumulate, age_power=self.age_power, device=self.device,
            warmup_steps=self._expert_steps(self.warmup), total_steps=max(1, self._expert_steps(self.updates)),
        )  # fmt: skip

    def _expert_steps(self, updates: int) -> int:
        """Steps of an expert during `updates` updates of the trunk, if all experts are chosen equally often."""
        share = min(1.0, self.rows * self.k_best / math.prod(self.grid)) / self.accumulate
        return round(updates * share)


def _is_device(name: object) -> bool:
    try:
        return isinstance(name, str) and bool(torch.device(name))
    except RuntimeError:
        return False
