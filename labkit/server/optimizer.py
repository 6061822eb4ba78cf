"""How an expert is trained: the configuration of a backend, its optimizer, its learning-rate schedule and its step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from labkit.server.hardware import check_device_name
from labkit.server.validation import HALF_PRECISION
from labkit.suggest import one_of, suggest_fields

T = TypeVar("T", bound=torch.optim.Optimizer)


@suggest_fields
@dataclass(frozen=True)
class BackendConfig:
    """How an expert is trained and what it accepts.

    Values are plain, since a config travels to server processes as JSON.

    Example:
        backend = lk.BackendConfig(lr=3e-4, clip_grad_norm=1)
        swarm.serve("ffn", hidden=256, grid=(4, 4), backend=backend)

    Args:
        optimizer: "adam" (default), "adamw" or "sgd".
        lr: Learning rate, at least 0. Default 1e-3.
        weight_decay: Weight decay of the optimizer. Default 0.
        amsgrad: Whether "adam" and "adamw" use their AMSGrad variant. Default False.
        beta1: Momentum of "adam" and "adamw", at least 0 and below 1. Default 0.9. Where many
            trainers make gradients stale, 0 is better: asynchrony is a momentum, too
            (Mitliagkas et al. 2016).
        momentum: Momentum of "sgd". Default 0.
        fused: Whether to use torch's fused optimizers, which are several times as fast.
            Default True; where a fused one would be wrong, another is used in any case.
        clip_grad_norm: Bound on the norm of all gradients of a step together. Default None:
            no bound.
        accumulate: Backward passes (merged batches) that make one optimizer step together.
            Default 1.
        schedule: Of the learning rate: "constant" (default), or "linear", which falls to 0 at
            `total_steps`. Both begin with the warm-up, if there is one.
        warmup_steps: Optimizer steps over which the learning rate rises to `lr`. Default 0.
        total_steps: Optimizer steps until a "linear" schedule reaches 0: more than
            `warmup_steps`. Default 0.
        age_power: P, where the learning rate of a step is multiplied by (1 + staleness)^-p.
            The staleness of a gradient is the number of steps that the expert has made since
            the forward pass of the same rows, where the caller says which that was. Default
            0: stale gradients count like fresh ones.
        max_batch_size: Rows that the expert computes at once. Larger requests are computed in
            parts, and answered and trained on as one. Default 4096.
        device: Where the expert computes: "cpu" (default), "cuda", "cuda:1", ….
        train_mode: Whether the module runs in train mode, so that dropout draws anew in each
            pass, and batch normalization normalizes over a batch of up to `max_batch_size`
            rows. Default False: it runs in eval mode, and the forward pass that a backward
            pass repeats is the same one.

    Raises:
        ValueError: A value is out of its range.
    """

    optimizer: str = "adam"  # "adam" | "adamw" | "sgd"
    lr: float = 1e-3
    weight_decay: float = 0.0
    amsgrad: bool = False  # adam, adamw
    beta1: float = 0.9  # adam, adamw
    momentum: float = 0.0  # sgd
    fused: bool = True
    clip_grad_norm: float | None = None
    accumulate: int = 1
    schedule: str = "constant"  # "constant" | "linear"
    warmup_steps: int = 0
    total_steps: int = 0
    age_power: float = 0.0
    max_batch_size: int = 4096
    device: str = "cpu"
    train_mode: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(one_of("optimizer", self.optimizer, OPTIMIZERS))
        if self.schedule not in ("constant", "linear"):
            raise ValueError(one_of("schedule", self.schedule, ("constant", "linear")))
        for name, least in (("accumulate", 1), ("max_batch_size", 1), ("warmup_steps", 0), ("total_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
                raise ValueError(f"{name}={value!r}: a whole number of at least {least}")
        if self.schedule == "linear" and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps={self.total_steps!r}: a linear schedule needs more of them than "
                f"warmup_steps={self.warmup_steps!r}"
            )
        for name in ("lr", "weight_decay", "momentum"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: a finite number of at least 0")
        if not (_is_number(self.beta1) and 0 <= self.beta1 < 1):
            raise ValueError(f"beta1={self.beta1!r}: at least 0 and below 1")
        if not (_is_number(self.age_power) and math.isfinite(self.age_power) and self.age_power >= 0):
            raise ValueError(f"age_power={self.age_power!r}: a finite number of at least 0")
        if self.clip_grad_norm is not None and not (_is_number(self.clip_grad_norm) and self.clip_grad_norm > 0):
            raise ValueError(f"clip_grad_norm={self.clip_grad_norm!r}: a number above 0; leave it out for no bound")
        object.__setattr__(self, "device", check_device_name(self.device))

    def lr_at(self, updates: int, staleness: float = 0.0) -> float:
        """The learning rate of a step: a schedule without state.

        Args:
            updates: Steps made before this one.
            staleness: That of the gradient, in updates. Default 0.
        """
        factor = min(1.0, (updates + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "linear" and updates >= self.warmup_steps:
            factor = max(0.0, (self.total_steps - updates) / (self.total_steps - self.warmup_steps))
        return self.lr * factor * math.pow(1.0 + staleness, -self.age_power)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def make_optimizer(parameters: list[nn.Parameter], config: BackendConfig) -> torch.optim.Optimizer | None:
    """The optimizer that the config names, or None where there is nothing to train.

    It is not a fused one where that would be wrong: 1. for a parameter with gaps in its memory, such as a slice of a
    larger tensor, which would be read and written as if it had none; 2. for SGD in half precision on the CPU, which
    moves only the last few numbers of a tensor, if any, up to torch 2.13
    (https://github.com/pytorch/pytorch/issues/191763); 3. for complex numbers, which fused ones do not take.
    """
    sgd = config.optimizer == "sgd"
    if config.fused and not all(
        _is_dense(p) and p.is_floating_point() and not (sgd and _is_half_on_cpu(p)) for p in parameters
    ):
        config = replace(config, fused=False)
    return OPTIMIZERS[config.optimizer](parameters, config) if parameters else None


def _is_dense(parameter: nn.Parameter) -> bool:
    return is_lazy(parameter) or torch.empty_like(parameter, device="meta").stride() == parameter.stride()


def _is_half_on_cpu(parameter: nn.Parameter) -> bool:
    return parameter.device.type == "cpu" and parameter.dtype in HALF_PRECISION


def take_step(
    optimizer: torch.optim.Optimizer, grads: Iterable[tuple[nn.Parameter, Tensor | None]], factor: float = 1.0
) -> None:
    """Take one step by these gradients times `factor`. No gradient stays allocated.

    If the step fails, as when memory runs out, the tensors that the optimizer began to keep for a parameter are
    dropped: it then has all of its tensors for each parameter, or none yet, and can go on. Parameters that it had
    changed by then stay changed. In the first step, where it allocates what it keeps, there are none.
    """
    kept = {p for p, slots in optimizer.state.items() if slots}
    try:
        for parameter, grad in grads:
            # Not changed in place: autograd may give one tensor for several parameters, and for an input.
            scaled = grad if grad is None or factor == 1.0 else grad * factor
            parameter.grad = scaled if scaled is None else laid_out(scaled, parameter)
        optimizer.step()
    except BaseException:
        for begun in set(optimizer.state) - kept:
            del optimizer.state[begun]
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)


def laid_out(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """The tensor, or a copy of it, with the strides of the parameter. It has the parameter's shape, or is one number.

    Fused optimizers read both as one row of numbers. `loss.backward()` makes the strides equal; `torch.autograd.grad`
    returns gradients as the module's operations left them: transposed, or expanded from one number.
    """
    fits = tensor.stride() == parameter.stride() or not tensor.ndim
    return tensor if fits else torch.empty_like(parameter).copy_(tensor)


def optimizer_slots(config: BackendConfig) -> tuple[str, ...]:
    """The tensors that the optimizer keeps for each parameter."""
    if config.optimizer == "sgd":
        return ("momentum_buffer",) if config.momentum else ()
    return ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if config.amsgrad else ()))


def _uncompiled(kind: type[T]) -> type[T]:
    """The same optimizer without the import of torch's compiler, which takes two CPU-seconds: nothing is compiled here.

    `torch.optim` imports `torch._dynamo` 1. when a method is called that is marked as not to be compiled: here they are
    as they were before they were marked; 2. in each `step`, to tell the compiler where to break: here a step is one
    under `no_grad`, which is what it comes to. Where torch does this in another way, nothing changes.
    """
    plain: dict[str, Any] = {"__doc__": kind.__doc__, "__module__": __name__}
    for name, method in vars(torch.optim.Optimizer).items():  # 1
        if isinstance(method, FunctionType) and method.__code__.co_filename == torch._compile.__file__:
            plain[name] = getattr(method, "__wrapped__", method)
    step: Any = kind.step
    if step.__code__.co_name == "_use_grad":  # 2
        plain["step"] = torch.no_grad()(step.__wrapped__)
    return cast(type[T], type(kind.__name__, (kind,), plain))


Adam = _uncompiled(torch.optim.Adam)
AdamW = _uncompiled(torch.optim.AdamW)
SGD = _uncompiled(torch.optim.SGD)


def _adam(config: BackendConfig) -> dict[str, Any]:
    return {
        "lr": config.lr, "betas": (float(config.beta1), 0.999), "weight_decay": config.weight_decay,
        "amsgrad": config.amsgrad, "fused": config.fused,
    }  # fmt: skip


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], BackendConfig], torch.optim.Optimizer]] = {
    "adam": lambda ps, c: Adam(ps, **_adam(c)),
    "adamw": lambda ps, c: AdamW(ps, **_adam(c)),
    "sgd": lambda ps, c: SGD(ps, lr=c.lr, weight_decay=c.weight_decay, momentum=c.momentum, fused=c.fused),
}
