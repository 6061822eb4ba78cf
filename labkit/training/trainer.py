"""Training: the readable loop. `trainer_threads` runs it in many threads that share one model.

Each trainer takes a batch, computes gradients with a replica that holds the parameters as they were when it began, and
applies them to the shared model under a lock (asynchronous SGD, as in the paper). So while one waits for the network
others compute, and gradients are as stale as the network makes them. A trainer is a thread, since a forward pass
through an MoE layer waits for the network in the middle of plain PyTorch code.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from labkit.client.in_models import swarms_of
from labkit.client.moe import MixtureOfExperts
from labkit.suggest import suggest_fields
from labkit.training.batches import Batch, batch_of
from labkit.training.forward import LossFunction, call, check_gradient, loss_of, on_device_of
from labkit.training.metrics import evaluate as evaluate
from labkit.training.optimizers import SCHEDULES as SCHEDULES
from labkit.training.optimizers import ScheduleFactory, check_schedule
from labkit.training.shared_model import SharedModel
from labkit.training.staleness import UpdateRule

WHOLE = {
    "steps": 1, "batch_size": 1, "trainers": 1, "max_failures": 1, "accumulate": 1, "every": 1, "patience": 1,
    "seed": 0, "warmup": 0,
}  # options that are whole numbers, each with its least value  # fmt: skip


@suggest_fields
@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train a model: the options of `lk.fit`.

    They concern the model's own parameters. Servers train their experts as `BackendConfig`
    says.

    Args:
        steps: Batches to train on. Give either `steps` or `epochs`.
        epochs: How often to go through the data, which must have a known length; 0.5 is half
            of it.
        batch_size: Rows of a batch, where the data are not batches already. Default 64.
        trainers: Batches in flight at the same time. Default 8.
        lr: Learning rate of an optimizer that `lk.fit` makes by name, and of a class if you
            give one. Default 1e-3.
        balance: Weight of the MoE layers' load-balancing losses in the loss. Default 0.
        seed: For the order of the rows. Default 0.
        max_failures: The run ends after so many failed batches in a row, over all trainers.
            Default 50.
        schedule: Of the learning rate: "constant" (default), "linear", down to 0 over the
            run, or a function of the optimizer that makes an `LRScheduler`, such as
            `lambda optimizer: CosineAnnealingLR(optimizer, T_max=1000)`. It takes a step
            after each update; `ReduceLROnPlateau` after each validation.
        accumulate: Batches whose mean gradient makes one update. Default 1.
        every: Steps from one validation to the next. Default None: an epoch's, or only at the
            end where the length of the data is not known.
        patience: The run stops when the validation loss has not improved in so many
            validations in a row; `run.best` has the model's state at its best. Default None:
            it does not.
        beta1: Momentum of Adam and AdamW, at least 0 and below 1. Default 0.9; less may be
            better where gradients are stale.
        warmup: Updates over which the learning rate rises to its value. Default 0.
        clip_grad_norm: Bound on the norm of all gradients of a step together. Default None:
            no bound.
        age_power: P, where the learning rate of a step is multiplied by (1 + staleness)^-p.
            Default 0.
        compensation: λ of delay compensation, which corrects a stale gradient for how far the
            parameters have moved (Zheng et al. 2017). Default 0.

    Raises:
        ValueError: A value is out of its range.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64
    trainers: int = 8
    lr: float = 1e-3
    balance: float = 0.0
    seed: int = 0
    max_failures: int = 50
    schedule: str | ScheduleFactory = "constant"
    accumulate: int = 1
    every: int | None = None
    patience: int | None = None
    beta1: float = 0.9
    warmup: int = 0
    clip_grad_norm: float | None = None
    age_power: float = 0.0
    compensation: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps=… or epochs=…")
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None and field.name != "schedule":
                object.__setattr__(self, field.name, self._number(field.name, value))
        check_schedule(self.schedule)
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1={self.beta1!r}: at least 0 and below 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs!r}: a finite number above 0")
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr={self.lr!r}: a finite number of at least 0")
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"balance={self.balance!r}: a finite number of at least 0")
        self.update_rule(0)

    @staticmethod
    def _number(name: str, value: Any) -> int | float:
        """A number that was given, maybe one of numpy, as Python's own. Raises `ValueError`."""
        if name not in WHOLE:
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name}={value!r}: a number")
            return value if isinstance(value, int) else float(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < WHOLE[name]:
            raise ValueError(f"{name}={value!r}: a whole number of at least {WHOLE[name]}")
        return int(value)

    def update_rule(self, total_steps: int) -> UpdateRule:
        """How gradients become updates in a run of so many steps. Raises `ValueError`."""
        decay_over = math.ceil(total_steps / self.accumulate) if self.schedule == "linear" else 0
        return UpdateRule(self.warmup, decay_over, self.clip_grad_norm, self.age_power, self.compensation)

    def total_steps(self, per_epoch: int | None) -> int:
        """How many steps to do. Raises `ValueError` if that takes `per_epoch` and it is None."""
        if self.epochs is None:
            assert self.steps is not None
            return self.steps
        if per_epoch is None:
            raise ValueError("epochs=… needs data of a known length; give steps=…")
        return max(1, round(self.epochs * per_epoch))


def train_step(
    shared: SharedModel, replica: nn.Module, batch: Batch | tuple[Any, ...], loss_function: LossFunction | None,
    balance: float,
) -> tuple[float, int]:  # fmt: skip
    """One step of one trainer: 1. parameters, 2. forward, 3. backward, which trains the experts too, 4. update.

    Args:
        shared: The model that all trainers train.
        replica: This trainer's copy of it.
        batch: What the data gave.
        loss_function: Of outputs and y; None for the model's own, or cross-entropy.
        balance: Weight of the MoE layers' load-balancing losses.

    Returns:
        The loss, without those, and the staleness of the gradients.

    Raises:
        NotEnoughExperts, NoExperts, RPCError, FloatingPointError: The shared model is as it was.
        ValueError: The loss is no mean, or depends on nothing that is trained.
    """
    forward_updates = shared.refresh(replica)  # 1
    replica.zero_grad(set_to_none=True)
    batch = on_device_of(replica, batch_of(batch))
    loss = loss_of(call(replica, batch), batch, loss_function)  # 2
    total = loss
    if balance:
        layers = (module for module in replica.modules() if isinstance(module, MixtureOfExperts))
        total = loss + balance * sum(layer.balance_loss for layer in layers if layer.balance_loss is not None)
    if not torch.isfinite(total):
        raise FloatingPointError(f"the loss is {total.item()}")
    check_gradient(total, replica)
    total.backward()  # type: ignore[no-untyped-call]  # 3
    shared.run_hooks(replica)
    reached = False
    for name, parameter in replica.named_parameters():
        if parameter.grad is None:
            continue
        reached = True
        if not shared.accepts(parameter.grad):
            raise FloatingPointError(
                f"the gradient of {name} is not finite, or its square is not, where the loss is {loss.item()}"
            )
    if not reached and not swarms_of(replica):
        raise ValueError("the loss depends on no parameter of the model, so nothing would learn")
    return loss.item(), shared.apply(replica, forward_updates)  # 4
