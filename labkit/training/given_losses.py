"""Losses that a caller gives: what is refused in words before torch computes another number with it, and what it means.

Torch's own are known here, as a module, a function or a `partial` of one; what is inside a function of the caller's is
not looked into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from labkit.suggest import did_you_mean
from labkit.training import losses

NAMES = ("cross_entropy", "next_token", "each_token", "binary_cross_entropy", "mse", "mae")  # of `lk.losses`
FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
}
PAIRED = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)  # each number of the outputs with one of y


def check_loss(loss: Any) -> None:
    """Raise `ValueError` for what is no loss, or one without a mean."""
    if loss is None:
        return
    if isinstance(loss, str):
        ours = f"loss=lk.losses.{loss}" if loss in NAMES else f"such as lk.losses.mse{did_you_mean(loss, NAMES)}"
        raise ValueError(f"loss={loss!r}: give the function itself, {ours}")
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise ValueError(f"loss={loss.__name__} is a class; give an instance, loss={loss.__name__}()")
    if not callable(loss):
        raise ValueError(f"loss={loss!r}: a function of outputs and y that returns their mean loss is needed")
    if options_of(loss).get("reduction") == "sum":
        raise ValueError(
            "loss: with reduction='sum' it is no mean, so it would depend on how many rows a batch has; leave the "
            "reduction out, or give reduction='mean'"
        )


def check_pairs(loss: Any, outputs: Any, y: Any) -> None:
    """Raise `ValueError` where torch would pair each output with each label, or take all rows for the scores of one."""
    if not (isinstance(outputs, Tensor) and isinstance(y, Tensor)):
        return
    function = function_of(loss)
    if function in PAIRED and outputs.shape != y.shape:
        raise ValueError(
            f"{function.__name__}: outputs {list(outputs.shape)} and y {list(y.shape)} have to have one shape, or "
            "torch pairs each with each; lk.losses.mse and lk.losses.mae take both"
        )
    if function is F.cross_entropy and outputs.ndim == 1:
        raise ValueError(losses.ONE_NUMBER.format(list(outputs.shape)))
    of_positions = outputs.ndim == 3 and y.shape == outputs.shape[:2] != outputs[:, 0].shape
    if function in (F.cross_entropy, F.nll_loss) and of_positions:
        raise ValueError(
            f"{function.__name__}: the scores {list(outputs.shape)} have classes in the last dimension, and torch "
            "takes them from the second; lk.losses.each_token takes these, where -100 does not count, or give "
            f"loss=lambda outputs, y: torch.nn.functional.{function.__name__}(outputs.transpose(1, 2), y, …)"
        )


def function_of(loss: Any) -> Any:
    """The function of torch that a loss is made of; itself if there is none."""
    if isinstance(loss, functools.partial):
        return loss.func
    return FUNCTIONS.get(type(loss), loss)


def options_of(loss: Any) -> Mapping[str, Any]:
    """The options that a loss was made with."""
    if isinstance(loss, functools.partial):
        return loss.keywords
    if not isinstance(loss, nn.Module):
        return {}
    return {name: getattr(loss, name, None) for name in ("reduction", "weight", "ignore_index")}


def terms(loss: Any, outputs: Any, y: Any, rows: int) -> float:
    """How many labels, or rows, a loss is the mean of, so that the means of batches make the mean of all.

    Args:
        loss: The loss function; None for a model that returns its loss.
        outputs: What the model returned.
        y: Labels.
        rows: Of the batch.

    Returns:
        Their number, or the sum of their weights where classes have weights.
    """
    if not isinstance(y, Tensor):
        return rows
    if loss is losses.next_token:
        return int((y[:, 1:] != losses.IGNORED).sum())
    function = function_of(loss)
    if loss is None or function in (losses.cross_entropy, losses.each_token, F.cross_entropy, F.nll_loss):
        if isinstance(outputs, Tensor) and y.shape == outputs.shape:  # probabilities, or one-hot rows
            return float(y.sum()) if y.ndim > 2 else rows  # (those of each position are 1 together)
        if y.is_floating_point() and not isinstance(outputs, Tensor):
            return rows
        options = options_of(loss)
        counted = y[:, 1:] if loss is None and is_causal(outputs, y) else y
        ignored, weight = options.get("ignore_index"), options.get("weight")
        counted = counted[counted != (losses.IGNORED if ignored is None else ignored)]
        return counted.numel() if weight is None else float(weight[counted.long()].sum())
    return y.numel() if loss in (losses.binary_cross_entropy, losses.mse, losses.mae) else rows


def is_causal(outputs: Any, y: Tensor) -> bool:
    """Whether a model that returns its loss shifts the labels itself, as the causal ones of Hugging Face do."""
    return "CausalLM" in type(outputs).__name__ and y.ndim == 2
