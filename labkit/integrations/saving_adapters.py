"""Adapters that servers train beside a model's experts, as a folder that `peft` loads: `save_adapters`.

`peft` itself lays the folder out: it adapts a model without numbers, and gets those that servers have learnt. Importing
this does not import peft.
"""

# e: experts of a layer; r: rank of the adapters; out, in: sizes of the linear layer that they are beside

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from labkit.client.session import find_session
from labkit.errors import LabkitError
from labkit.expert_file import read_expert
from labkit.integrations.attaching import AttachedExperts, Model, attached_layers, fetch_experts, weights_in
from labkit.integrations.layouts import expert_layers, laid_out, parameters_of_linear
from labkit.paths import user_path

ADAPTER = "default"  # peft's name for one that has no other


def save_adapters(model: Model, folder: str | Path) -> None:
    """Save the adapters of a model's experts (`serve_experts(…, lora=…)`), as they are now, for `peft`.

    The model stays attached, and its servers go on. What was trained here, as the router and
    attention, is not in the folder: `model.save_pretrained` saves it. Needs peft.

    Example:
        lkt.save_adapters(model, "adapters")
        # without a swarm, in another program:
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(…), "adapters")

    Args:
        model: A model that was attached.
        folder: Where to; it is made if it does not exist.

    Raises:
        ValueError: The model is not attached, or its experts have no adapters.
        LabkitError: An expert cannot be read.
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("save_adapters needs peft: pip install peft") from error
    folder = user_path(folder, "folder")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = attached_layers(base)
    if not layers:
        raise ValueError(f"this {type(model).__name__} is not attached to a swarm, so no server has adapters for it")
    learnt = [_learnt(attached) for _, attached in layers]
    rank, names = len(learnt[0]["up_lora.a"][0]), parameters_of_linear(layers[0][0].module)
    config = LoraConfig(
        r=rank, lora_alpha=layers[0][1].lora_scale * rank, target_modules=[],
        target_parameters=[f"{layers[0][0].path.rpartition('.')[2]}.{name}" for name in names.values()],
    )  # fmt: skip
    with torch.device("meta"):
        empty = type(base)(base.config)
    empty.name_or_path = base.name_or_path
    adapted = get_peft_model(empty, config)
    places = {id(layer.module): number for number, layer in enumerate(expert_layers(empty))}
    for wrapper in [module for module in adapted.modules() if hasattr(module, "parameter_name")]:
        module = wrapper.get_base_layer()
        linear = next(linear for linear, name in names.items() if name == wrapper.parameter_name)
        _fill(wrapper, module, linear, learnt[places[id(module)]])
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def _learnt(attached: AttachedExperts) -> dict[str, list[Tensor]]:
    """The adapters of all experts of a layer, by name."""
    experts, found = attached.experts, dict[str, list[Tensor]]()
    with TemporaryDirectory(prefix="labkit-experts-") as place:
        session = find_session(experts.swarm)
        session.run(fetch_experts, session, experts, Path(place))
        for e in range(experts.grid[1]):
            uid = f"{experts.prefix}.{e}"
            weights = weights_in(read_expert(Path(place) / f"{uid}.safetensors", uid)[0])
            if "up_lora.a" not in weights:
                raise ValueError(f"{uid} has no adapters: its servers train all of it; detach brings it home")
            for name, tensor in weights.items():
                if "_lora." in name:
                    found.setdefault(name, []).append(tensor.clone())
    return found


def _fill(wrapper: Any, module: nn.Module, linear: str, learnt: Mapping[str, Sequence[Tensor]]) -> None:
    """Put what one linear layer's adapters have learnt where peft has it."""
    a = torch.cat(list(learnt[f"{linear}_lora.a"]))  # [e * r, in]
    b = [laid_out(module, linear, each) for each in learnt[f"{linear}_lora.b"]]  # each [out, r]
    stacked = torch.stack(b, dim=-1).flatten(1)  # [out, r * e]: of each row of A's, all experts
    for adapters, tensor in ((wrapper.lora_A, a), (wrapper.lora_B, stacked)):
        if adapters[ADAPTER].weight.shape != tensor.shape:
            version = importlib.metadata.version("peft")
            raise LabkitError(f"peft {version} lays the adapters of experts out in a way that is not known here")
        adapters[ADAPTER].weight = nn.Parameter(tensor)
