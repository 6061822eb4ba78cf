"""A forward pass over any batch, and its loss: what `trainer.train_step` and `metrics` have in common.

On a batch's way: `batches` takes apart what the data give; here a model is called with it, where its parameters are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from labkit.training.batches import TARGETS, Batch, moved
from labkit.training.given_losses import check_pairs
from labkit.training.losses import cross_entropy, each_token, scores_of

LossFunction = Callable[[Any, Any], Tensor]


def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    """The batch where the model's parameters are; as it is if they are at several places, or there are none."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return batch
    (device,) = devices
    inputs = moved(batch.inputs, device)
    both = [now for now, before in zip(inputs, batch.inputs, strict=True) if before is batch.target]  # input and y
    target = both[0] if both else moved(batch.target, device)
    return replace(batch, inputs=inputs, keywords=moved(batch.keywords, device), target=target)


def call(model: nn.Module, batch: Batch) -> Any:
    """What a model returns for a batch.

    A dictionary's labels are left out if the model takes none by that name. A dictionary that is the only input of a
    pair `(x, y)` is taken apart if the model takes all of its names.
    """
    if len(batch.inputs) == 1 and isinstance(batch.inputs[0], Mapping) and not batch.keywords:
        names = _names(model)
        if names is not None and set(batch.inputs[0]) <= names:
            return model(**batch.inputs[0])
    if not batch.keywords:
        return model(*batch.inputs)
    names = _names(model)
    keywords = {
        name: value for name, value in batch.keywords.items() if names is None or name in names or name not in TARGETS
    }
    return model(*batch.inputs, **keywords)


def _names(model: nn.Module) -> set[str] | None:
    """The names of a model's inputs; None if it takes any."""
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL}


def loss_of(outputs: Any, batch: Batch, loss_function: LossFunction | None) -> Tensor:
    """The loss of a batch, a scalar: by the function, or the model's own, or cross-entropy.

    Raises:
        ValueError: It is no mean, or there is nothing to compute it from.
    """
    check_pairs(loss_function, outputs, batch.target)
    if batch.by_position and loss_function is cross_entropy:
        loss_function = each_token
    loss = loss_function(outputs, batch.target) if loss_function is not None else own_loss(outputs, batch)
    if loss is None:
        if not isinstance(batch.target, Tensor):
            raise ValueError(
                "there is no y in this batch, and the model returns no loss: give batches (x, y), or a dictionary with "
                f"one of {', '.join(TARGETS)}, or loss=…, a function of the outputs and y"
            )
        scores = scores_of(outputs)
        if scores.ndim == 3 and any(part is batch.target for part in batch.inputs):
            raise ValueError(
                f"data: a batch of tokens {list(batch.target.shape)} is input and y, and the model scores classes at "
                "each position: for which token? Give loss=lk.losses.next_token, or loss=lk.losses.each_token if it "
                "is to say what it was given"
            )
        loss = (each_token if batch.by_position else cross_entropy)(scores, batch.target)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the loss is a {type(loss).__name__}; a tensor is needed, with one number, which knows its gradient"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the loss has the shape {list(loss.shape)}, and is to be one number: give its mean, as reduction='mean' "
            "or .mean() do"
        )
    return loss.reshape(())


def own_loss(outputs: Any, batch: Batch) -> Tensor | None:
    """The loss that a model returns itself, as those of Hugging Face do; None if there is none."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(found, Tensor):
        return found
    first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if batch.keywords and isinstance(first, Tensor) and first.ndim == 0:
        return first
    return None


def check_gradient(loss: Tensor, model: nn.Module) -> None:
    """Raise `ValueError` if a loss depends on nothing that is trained."""
    if not loss.requires_grad:
        frozen = not any(parameter.requires_grad for parameter in model.parameters())
        raise ValueError(
            "the loss depends on no parameter, so nothing would learn: "
            + (
                "all parameters are frozen"
                if frozen
                else "is something detached, or under torch.no_grad(), on its way?"
            )
        )


def initialise(model: nn.Module, first_batch: Callable[[], Batch]) -> None:
    """Give the parameters of lazy modules their shapes, by a forward pass in eval mode, in which nothing is learnt.

    Args:
        model: The model; one without lazy modules is left alone.
        first_batch: Returns a batch.

    Raises:
        ValueError: The forward pass did not come to all of them.
    """
    if not _lazy(model):
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            call(model, on_device_of(model, first_batch()))
    finally:
        for module, training in modes:
            module.training = training
    if lazy := _lazy(model):
        raise ValueError(f"{', '.join(lazy)}: lazy, and not used for the first batch, so their shapes are not known")


def _lazy(model: nn.Module) -> list[str]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor)]
