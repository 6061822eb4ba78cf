"""Models whose weights accelerate keeps in memory or on disk, and brings to a device for each pass.

Such a module has a hook, which knows where its weights are; its parameters are without numbers ("meta") in between.
Importing this does not import accelerate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def numbers_of(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter of a module, from where it is kept, if that is elsewhere.

    Raises `ValueError` if it is nowhere.
    """
    if not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        if (kept := getattr(hook, "weights_map", None)) is not None:
            found: Tensor = kept[name]
            return found
    raise ValueError(
        f"{name} of this {type(module).__name__} has no numbers, only a shape: load the model onto a device, or give "
        "the folder where it was saved"
    )


def device_of_passes(modules: Iterable[nn.Module]) -> torch.device:
    """Where these modules compute, those among them with a hook counting first; the CPU if nothing is known."""
    modules = list(modules)
    for hook in (hook for module in modules for hook in _hooks(module)):
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    own = (parameter.device for module in modules for parameter in module.parameters() if not parameter.is_meta)
    return next(own, torch.device("cpu"))


def keep_here(module: nn.Module) -> None:
    """From now on the parameters of a module stay where they are, and are not fetched from where they were kept."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False):
            hook.offload = False


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [*getattr(hook, "hooks", (hook,))]
