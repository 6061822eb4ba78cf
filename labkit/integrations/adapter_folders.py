"""Adapters beside a model's experts, as folders that `peft` writes and reads: `save_adapters`, `FolderOfAdapters`.

`peft` itself says how such a folder is laid out: it adapts a model without numbers, and has a place for each adapter.
Importing this does not import peft.
"""

# e: experts of a layer; r: rank of the adapters; out, in: sizes of the linear layer that they are beside

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from labkit.client.session import find_session
from labkit.errors import LabkitError
from labkit.expert_file import read_expert
from labkit.integrations.attaching import AttachedExperts, Model, attached_layers, fetch_experts, weights_in
from labkit.integrations.layouts import expert_layers, laid_out, parameters_of_linear, with_gate_first
from labkit.paths import user_path

ADAPTER = "default"  # peft's name for one that has no other
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # files of a folder


def save_adapters(model: Model, folder: str | Path) -> None:
    """Save the adapters of a model's experts (`serve_experts(…, lora=…)`), as they are now, for `peft`.

    The model stays attached, and its servers go on. What was trained here, as the router and
    attention, is not in the folder: `model.save_pretrained` saves it. Needs peft.

    Example:
        lkt.save_adapters(model, "adapters")
        # without a swarm, in another program:
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(…), "adapters")
        # or in another swarm:
        lkt.serve_experts(swarm, model, lora="adapters")

    Args:
        model: A model that was attached.
        folder: Where to; it is made if it does not exist.

    Raises:
        ValueError: The model is not attached, or its experts have no adapters.
        LabkitError: An expert cannot be read.
        ImportError: peft is not installed.
    """
    peft = _peft("save_adapters")
    folder = user_path(folder, "folder")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = attached_layers(base)
    if not layers:
        raise ValueError(f"this {type(model).__name__} is not attached to a swarm, so no server has adapters for it")
    learnt = [_learnt(attached) for _, attached in layers]
    rank, first = len(learnt[0]["up_lora.a"][0]), layers[0][0]
    alpha = layers[0][1].lora_scale * rank
    adapted = _without_numbers(base, peft.LoraConfig(
        r=rank, lora_alpha=int(alpha) if alpha.is_integer() else alpha, target_modules=[],
        target_parameters=[f"{_last(first.path)}.{name}" for name in parameters_of_linear(first.module).values()],
        task_type="CAUSAL_LM" if type(base).__name__.endswith("ForCausalLM") else None,
    ))  # fmt: skip
    for _, wrapper, number, linear in _places(adapted):
        module, some = wrapper.get_base_layer(), learnt[number]
        b = [laid_out(module, linear, each) for each in some[f"{linear}_lora.b"]]  # each [out, r]
        _put(wrapper.lora_A, torch.cat(list(some[f"{linear}_lora.a"])))  # [e * r, in]
        _put(wrapper.lora_B, torch.stack(b, dim=-1).flatten(1))  # [out, r * e]: of each of the r, all experts
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


class FolderOfAdapters:
    """Adapters of a model's experts in a folder, as `save_adapters` or peft has saved them. Needs peft.

    Those of other parts of the model are left alone: `peft.PeftModel` has them.

    Args:
        folder: The folder.
        model: The model, or one like it without numbers.

    Attributes:
        config: Its `peft.LoraConfig`.

    Raises:
        ValueError: It is no such folder, or its adapters are not beside both linear layers of each expert.
        ImportError: peft is not installed.
    """

    def __init__(self, folder: Path, model: Model) -> None:
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise ValueError(f"lora: {folder} is no folder of adapters, which has {CONFIG} and {WEIGHTS}")
        peft = _peft("lora=FOLDER")
        self.folder = folder
        self.config: Any = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(self.config, peft.LoraConfig) or self.config.rank_pattern or self.config.alpha_pattern:
            raise ValueError(f"lora: the adapters in {folder} are not LoRA of one rank for all layers")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers = expert_layers(base)
        self._modules = [layer.module for layer in layers]
        self._counts = [layer.count for layer in layers]
        self._keys = {
            (number, linear): name for name, _, number, linear in _places(_without_numbers(base, self.config))
        }
        if len(self._keys) != 2 * len(layers):
            raise ValueError(f"lora: the adapters in {folder} are not beside both linear layers of each expert")

    def of(self, number: int, e: int) -> dict[str, Tensor]:
        """The adapters of one expert, by name, as the kind "gated" has them: expert `e` of the layer `number`."""
        found, count, rank = dict[str, Tensor](), self._counts[number], self.config.r
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            for linear in ("up", "down"):
                key = self._keys[number, linear]
                a = file.get_slice(f"{key}.lora_A.weight")[e * rank : (e + 1) * rank]  # [r, in]
                b = file.get_tensor(f"{key}.lora_B.weight").unflatten(1, (rank, count))[..., e]  # [out, r]
                if linear == "up":
                    b = with_gate_first(self._modules[number], b)
                found[f"{linear}_lora.a"], found[f"{linear}_lora.b"] = a, b
        return {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
            for name, tensor in found.items()
        }


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{what} needs peft: pip install peft") from error
    return peft


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _without_numbers(model: Any, config: Any) -> Any:
    """What peft makes of a model like this one, in which no parameter has numbers."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.name_or_path = getattr(model, "name_or_path", "")
    return _peft("this").get_peft_model(empty, config)


def _places(adapted: Any) -> Iterator[tuple[str, Any, int, str]]:
    """Where peft has adapters of experts: the name in files, the module, which layer, and "up" or "down"."""
    layers = {id(layer.module): number for number, layer in enumerate(expert_layers(adapted.get_base_model()))}
    for name, wrapper in adapted.named_modules():
        if hasattr(wrapper, "parameter_name"):
            module = wrapper.get_base_layer()
            for linear, parameter in parameters_of_linear(module).items():
                if parameter == wrapper.parameter_name:
                    yield name, wrapper, layers[id(module)], linear


def _learnt(attached: AttachedExperts) -> Mapping[str, Sequence[Tensor]]:
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


def _put(adapters: Any, tensor: Tensor) -> None:
    if adapters[ADAPTER].weight.shape != tensor.shape:
        version = importlib.metadata.version("peft")
        raise LabkitError(f"peft {version} lays the adapters of experts out in a way that is not known here")
    adapters[ADAPTER].weight = nn.Parameter(tensor)
