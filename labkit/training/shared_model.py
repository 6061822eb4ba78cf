"""The model that all trainers of a run share: each computes on a replica of it and brings its gradients back here.

A batch's way begins and ends here: `trainer.train_step` refreshes its replica first, and applies its gradients last.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.training.replicas import copy_buffers, copy_model, training_modes
from labkit.training.staleness import DelayCompensation, UpdateRule, widened

MAX_FLOAT16 = 65504.0  # the largest number of float16
MAX_FLOAT16_TO_SQUARE = 255.875  # the largest whose square is a number of float16, too


class SharedModel:
    """The model that all trainers train, its optimizer, and how many updates it has had.

    Args:
        model: The model; its parameters change in place.
        optimizer: Made from the model's parameters; None for a model that has none.
        rule: How gradients become updates; by default as if they were fresh.
        schedule: Sets the optimizer's learning rates after each update; by default nobody does.
        accumulate: Gradients whose mean makes one update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        rule: UpdateRule | None = None,
        schedule: Any = None,
        accumulate: int = 1,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.updates = 0
        self.rule = rule or UpdateRule()
        self._compensation = DelayCompensation(self.rule.compensation) if self.rule.compensation else None
        self._rates = [group["lr"] for group in optimizer.param_groups] if optimizer else []
        self._accumulate = accumulate
        self._gradients = 0  # that wait in the parameters' `grad`
        self._modes = training_modes(model)
        self._lock = threading.Lock()
        small = self.rule.clip_grad_norm is not None and self.rule.clip_grad_norm <= 255  # what the optimizer gets
        not_squared = small or isinstance(optimizer, torch.optim.SGD)
        self._max_float16 = MAX_FLOAT16 if not_squared else MAX_FLOAT16_TO_SQUARE

    def replica(self) -> nn.Module:
        """A copy for one trainer."""
        with self._lock:
            return copy_model(self.model, self._modes)

    @torch.no_grad()
    def refresh(self, replica: nn.Module) -> int:
        """Copy the current parameters and buffers to a replica. Returns how many updates are in them."""
        with self._lock:
            for mine, shared in zip(replica.parameters(), self.model.parameters(), strict=True):
                mine.copy_(shared)
                if mine.requires_grad != shared.requires_grad:  # changed by the caller meanwhile
                    mine.requires_grad_(shared.requires_grad)
            copy_buffers(self.model, replica)
            return self.updates

    @torch.no_grad()
    def run_hooks(self, replica: nn.Module) -> None:
        """Call the gradient hooks of the model's parameters with a replica's gradients, as a backward pass would."""
        for shared, mine in zip(self.model.parameters(), replica.parameters(), strict=True):
            for hook in list((shared._backward_hooks or {}).values()):
                if mine.grad is not None and (changed := hook(mine.grad)) is not None:
                    mine.grad = changed

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
            staleness = self.updates - forward_updates
            parameters, replicas = list(self.model.parameters()), list(replica.parameters())
            if self._compensation is not None:
                self._compensation.apply([mine.grad for mine in replicas], parameters, replicas)
                for mine in replicas:
                    if mine.grad is not None and mine.grad.dtype == torch.float16:
                        mine.grad.clamp_(-self._max_float16, self._max_float16)  # no correction goes further
            for shared, mine in zip(parameters, replicas, strict=True):
                if self._gradients == 0 or shared.grad is None:
                    shared.grad = mine.grad
                elif mine.grad is not None:
                    shared.grad = shared.grad + mine.grad
                if mine.grad is not None:
                    for hook in list((shared._post_accumulate_grad_hooks or {}).values()):
                        hook(shared)
            self._gradients += 1
            with torch.no_grad():
                copy_buffers(replica, self.model)  # so running averages are those of the last trainer
            if self._gradients >= self._accumulate:
                self._update(parameters, staleness)
            return staleness

    def finish(self) -> None:
        """Make an update of the gradients that are left when a run is over."""
        with self._lock:
            if self._gradients:
                self._update(list(self.model.parameters()), 0)

    def _update(self, parameters: list[nn.Parameter], staleness: int) -> None:
        """Make one update of the gradients that have been accumulated."""
        optimizer, rule = self.optimizer, self.rule
        if self._gradients > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad / self._gradients
        self._gradients = 0
        if rule.clip_grad_norm is not None:
            _clip(parameters, rule.clip_grad_norm)
        if optimizer is not None:
            if self.schedule is not None:
                self._rates = [group["lr"] for group in optimizer.param_groups]
            if rule.changes_rates:  # else they are the caller's own to change
                for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                    group["lr"] = rate * rule.rate(self.updates, staleness)
            optimizer.step()
            if self.schedule is not None:
                for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                    group["lr"] = rate
                if not isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    self.schedule.step()
        self.model.zero_grad(set_to_none=True)
        self.updates += 1

    def validated(self, loss: float) -> None:
        """Tell a schedule that depends on it, such as `ReduceLROnPlateau`, the loss of a validation."""
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            with self._lock:
                self.schedule.step(loss)

    # ------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """All but the model's own state, as copies: optimizer, schedule, and gradients that wait for others."""
        with self._lock:
            return {
                "optimizer": None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
                "schedule": None if self.schedule is None else copy.deepcopy(self.schedule.state_dict()),
                "rates": list(self._rates),
                "updates": self.updates,
                "squares": {} if self._compensation is None else self._compensation.state_dict(),
                "gradients": self._gradients,
                "accumulated": [
                    parameter.grad.clone() if self._gradients and parameter.grad is not None else None
                    for parameter in self.model.parameters()
                ],
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, in the same process or another.

        Raises:
            ValueError: It is the state of another model, optimizer or schedule.
        """
        for name, ours in (("optimizer", self.optimizer), ("schedule", self.schedule)):
            if (ours is None) != (state[name] is None):
                has, had = ("no", "one") if ours is None else ("one", "none")
                raise ValueError(f"{name}: this run has {has}, and the run that was saved had {had}")
        with self._lock:
            parameters = list(self.model.parameters())
            if len(parameters) != len(state["accumulated"]):
                raise ValueError(
                    f"this model has {len(parameters)} parameters, and that of the run that was saved had "
                    f"{len(state['accumulated'])}"
                )
            if self.optimizer is not None:
                self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            if self.schedule is not None:
                self.schedule.load_state_dict(copy.deepcopy(state["schedule"]))
            self._rates, self.updates, self._gradients = list(state["rates"]), state["updates"], state["gradients"]
            if self._compensation is not None:
                self._compensation.load_state_dict(state["squares"])
            for parameter, grad in zip(parameters, state["accumulated"], strict=True):
                parameter.grad = None if grad is None else grad.to(parameter.device, copy=True)


def _clip(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Clip like `torch.nn.utils.clip_grad_norm_`, which takes float16 norms above 65504 for infinite and gives 0."""
    grads = [widened(parameter.grad) for parameter in parameters if parameter.grad is not None]
    nn.utils.clip_grads_with_norm_(parameters, max_norm, nn.utils.get_total_norm(grads))
