"""A Transformers model is loaded without its experts, which are in a swarm: `from_pretrained`.

transformers makes a model without numbers, then reads what it has parameters for. Here the model has none for experts
when it begins to read, so that theirs are never read, and this process at no time holds them. Importing this imports
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from labkit.integrations.attaching import Model, attach, check_grid
from labkit.integrations.layouts import ExpertLayer, expert_layers, grid_name_of, grid_of, own_parameters
from labkit.integrations.model_folders import model_class, plain_quantization

if TYPE_CHECKING:
    from labkit.swarm import Swarm

INIT = "_init_weights"  # how transformers draws numbers for what it has not read
OF_EXPERTS = r"(^|\.)experts\."  # in the names of tensors that are left unread


def from_pretrained(
    model: str | Path, swarm: Swarm, *, name: str | None = None, missing: str = "raise",
    train_experts: bool | None = None, timeout: float = 10.0, codec: str | None = None, **options: Any,
) -> Model:  # fmt: skip
    """Load a model of Transformers whose experts are in a swarm, without them.

    It comes as `attach` leaves one: attention, router and all else are here, and experts are
    called. For models that do not fit into this machine: theirs are served by others, each of
    which reads its own.

    Example:
        # elsewhere: labkit serve --join … --experts-of FOLDER --experts 64
        model = lkt.from_pretrained("FOLDER", swarm)
        model.generate(…)

    Args:
        model: The folder where the model was saved, or its name on the hub.
        swarm: The swarm that has its experts: see `serve_experts`.
        name: The name of their grid, by default that of the kind of model ("olmoe").
        missing: As for `attach`.
        train_experts: As for `attach`.
        timeout: As for `attach`.
        codec: As for `attach`.
        **options: Others of Transformers' own `from_pretrained`, such as `dtype` or
            `device_map`. What was quantized (FP8, MXFP4) becomes plain numbers.

    Returns:
        The model.

    Raises:
        ValueError: It has no experts, or the swarm has none or others under this name.
        OSError: There is no such model.
    """
    source = str(model)
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(source)
    if "quantization_config" not in options and (quantization := plain_quantization(config)) is not None:
        config.quantization_config = quantization
    plain, grid_name = model_class(config), grid_name_of(config) if name is None else name
    without = dict[str, dict[str, nn.Parameter]]()  # path of a module of experts -> its parameters, without numbers
    found = list[ExpertLayer]()

    def without_experts(self: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)
        found[:] = expert_layers(self)
        if not found:
            raise ValueError(f"this {plain.__name__} has no experts that could be elsewhere")
        check_grid(swarm, grid_name, grid_of(found), found)  # before anything is read
        for layer in found:
            without[layer.path] = own_parameters(layer.module)
            _put(layer, without[layer.path], None)
            layer.module._is_hf_initialized = True  # type: ignore[assignment]  # so that it draws no numbers
        for part in self.modules():
            if isinstance(part, transformers.PreTrainedModel):
                part.__dict__[INIT] = partial(init_weights, getattr(part, INIT))
        ignored = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {*ignored, OF_EXPERTS}

    def init_weights(init: Callable[[nn.Module], None], module: nn.Module) -> None:
        around = [layer for layer in found if layer.block is module]
        for layer in around:  # some families draw numbers for experts where their router is
            _put(layer, without[layer.path], torch.empty(0))
        init(module)
        for layer in around:
            _put(layer, without[layer.path], None)

    class_without = type(plain.__name__, (plain,), {"__init__": without_experts, "__module__": plain.__module__})
    loaded: Any = class_without.from_pretrained(source, config=config, **options)  # type: ignore[attr-defined]
    loaded.__class__ = plain
    for part in loaded.modules():
        part.__dict__.pop(INIT, None)
    for path, parameters in without.items():
        for parameter, value in parameters.items():
            loaded.get_submodule(path).register_parameter(parameter, value)
    attach(
        loaded, swarm, name=name, missing=missing, train_experts=train_experts, timeout=timeout, codec=codec
    )  # fmt: skip
    return loaded


def _put(layer: ExpertLayer, names: Iterable[str], numbers: Tensor | None) -> None:
    for name in names:
        layer.module.register_parameter(name, None if numbers is None else nn.Parameter(numbers))
