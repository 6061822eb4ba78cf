"""What `optimizer=` and `schedule=` of `lk.fit` may be, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from labkit.server.optimizer import SGD, Adam, AdamW
from labkit.suggest import did_you_mean

DEFAULT_LR = 1e-3
SCHEDULES = ("constant", "linear")

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ScheduleFactory = Callable[[torch.optim.Optimizer], Any]

NAMED: dict[str, Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr, beta1: Adam(parameters, lr=lr, betas=(beta1, 0.999)),
    "adamw": lambda parameters, lr, beta1: AdamW(parameters, lr=lr, betas=(beta1, 0.999)),
    "sgd": lambda parameters, lr, beta1: SGD(parameters, lr=lr),
}
ADVICE = "give a name, a class, or a function of the parameters: optimizer=lambda p: torch.optim.SGD(p, lr=0.1)"


def make_optimizer(
    wanted: str | OptimizerFactory | None, model: nn.Module, lr: float, beta1: float
) -> torch.optim.Optimizer | None:
    """The optimizer of a model's own parameters, or None if it has none.

    Args:
        wanted: A name in `NAMED`, a class, or a function of the parameters; by default Adam.
        model: The model.
        lr: Learning rate of a named one, and of a class if it is not `DEFAULT_LR`.
        beta1: Momentum of Adam and AdamW.

    Raises:
        ValueError: It is none of these, or no optimizer of this model comes out.
    """
    wanted = "adam" if wanted is None else wanted
    if isinstance(wanted, torch.optim.Optimizer):
        raise ValueError(f"optimizer={type(wanted).__name__}(…) is an instance, made for a model before; {ADVICE}")
    if isinstance(wanted, str) and wanted not in NAMED:
        raise ValueError(
            f"optimizer={wanted!r}: one of {', '.join(NAMED)}, a class or a function{did_you_mean(wanted, NAMED)}"
        )
    if not callable(wanted) and not isinstance(wanted, str):
        raise ValueError(f"optimizer={wanted!r}: {ADVICE}")
    parameters = list(model.parameters())
    if not parameters:
        return None
    if isinstance(wanted, str):
        return NAMED[wanted](parameters, lr, float(beta1))
    options = {"lr": lr} if isinstance(wanted, type) and lr != DEFAULT_LR else {}
    optimizer = wanted(parameters, **options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: the function returned a {type(optimizer).__name__} and no optimizer; {ADVICE}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS computes the loss several times a step, which trainers cannot do")
    own = set(parameters)
    if any(parameter not in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(f"optimizer: it has parameters that are not this model's; {ADVICE}")
    return optimizer


def check_schedule(schedule: object) -> None:
    """Raise `ValueError` for what is neither a name nor a function."""
    if isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        raise ValueError(
            f"schedule={type(schedule).__name__}(…) is an instance, made for another optimizer; give a function: "
            "schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)"
        )
    if not callable(schedule) and schedule not in SCHEDULES:
        hint = did_you_mean(schedule, SCHEDULES)
        raise ValueError(f"schedule={schedule!r}: one of {', '.join(SCHEDULES)}, or a function of the optimizer{hint}")


def make_schedule(schedule: str | ScheduleFactory, optimizer: torch.optim.Optimizer | None) -> Any:
    """What sets the learning rates after each update; None for the names, which an `UpdateRule` follows.

    Raises:
        ValueError: The function returned no schedule.
    """
    if isinstance(schedule, str) or optimizer is None:
        return None
    try:
        made = schedule(optimizer)
    except TypeError as error:
        raise ValueError(
            f"schedule: {getattr(schedule, '__name__', schedule)} cannot be made of the optimizer alone ({error}); "
            "give a function: schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=100)"
        ) from error
    if not (hasattr(made, "step") and hasattr(made, "state_dict")):
        raise ValueError(f"schedule: the function returned {made!r}, and no LRScheduler of torch")
    return made
