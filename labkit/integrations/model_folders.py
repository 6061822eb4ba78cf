"""The experts in a folder where a Transformers model was saved, read one at a time.

No process ever holds all of them: safetensors files are read lazily. A family's files have the experts of a layer in
one tensor each, or each expert by itself, under names of the family's own; both are found here. Importing this imports
transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from labkit.integrations.layouts import PARAMETERS, ExpertLayer, expert_layers, weights_of

_KEY = re.compile(r"(?P<layer>.*)\.experts\.(?:(?P<number>\d+)\.)?(?P<name>[\w.]+)")
_GRANITE = re.compile(r"(?P<layer>.*\.block_sparse_moe)\.(?P<name>input|output)_linear\.weight")
_OF_GRANITE = {"input": "gate_up_proj", "output": "down_proj"}  # name there -> as others call it
_NAMES = {  # of an expert by itself -> what it is
    "gate_proj.weight": "gate", "w1.weight": "gate", "up_proj.weight": "up", "w3.weight": "up",
    "down_proj.weight": "down", "w2.weight": "down", "gate_up_proj.weight": "gate_up",
}  # fmt: skip


class ModelFolder:
    """A folder with a model's `config.json` and safetensors files.

    Args:
        path: The folder.

    Attributes:
        config: The model's configuration.
        model: It, without numbers.
        layers: Its layers with experts.

    Raises:
        ValueError: It is no such folder, or its experts are not stored in a way that is known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{path} is no folder of a Transformers model, since it has no config.json; `hf download NAME` fetches "
                "one, and says where it is"
            )
        self.config: Any = transformers.AutoConfig.from_pretrained(path)
        self._files = _files(path)
        self._tensors = self._find()
        with torch.device("meta"):
            self.model: Any = self._model_class()(self.config)
        if not expert_layers(self.model):
            raise ValueError(f"the model in {path}, a {type(self.model).__name__}, has no experts that could be served")
        self.layers = expert_layers(self.model.to(self._dtype()))
        if len(self._tensors) < len(self.layers):
            raise ValueError(
                f"the files in {path} have {len(self._tensors)} layers of experts under names that are known here, and "
                f"the model has {len(self.layers)}"
            )

    def weights(self, number: int, e: int) -> dict[str, Tensor]:
        """The parameters of one expert as the kind "gated" has them: expert `e` of the layer `number`."""
        layer, tensors = self.layers[number], self._tensors[number]
        return weights_of(self._stand_in(layer, tensors, e), 0)

    def _stand_in(self, layer: ExpertLayer, tensors: Mapping[tuple[int | None, str], str], e: int) -> Any:
        """What has the same attributes as the module of a layer, with the weights of a single expert."""
        module: Any = layer.module
        flags = {flag: getattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated")}
        together = {name: key for (number, name), key in tensors.items() if number is None and name in PARAMETERS}
        if together:
            return SimpleNamespace(**flags, **{name: self._read(key, e)[None] for name, key in together.items()})
        own = {_NAMES[name]: key for (number, name), key in tensors.items() if number == e and name in _NAMES}
        ups = ["gate_up"] if "gate_up" in own else ["gate", "up"] if module.has_gate else ["up"]
        if missing := {"down", *ups} - own.keys():
            lacking = " and ".join(sorted(missing))
            raise ValueError(f"the files in {self.path} have no {lacking} of expert {e} at {layer.path}")
        up, down = torch.cat([self._read(own[name]) for name in ups]), self._read(own["down"])
        # Experts that are stored by themselves are so as linear layers have them.
        plain = {"has_bias": False, "is_transposed": False, "is_concatenated": True}
        first = "gate_up_proj" if module.has_gate else "up_proj"
        return SimpleNamespace(**{**flags, **plain, first: up[None], "down_proj": down[None]})

    def _read(self, key: str, e: int | None = None) -> Tensor:
        with safe_open(self._files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key) if e is None else file.get_slice(key)[e]
            return tensor

    def _find(self) -> list[dict[tuple[int | None, str], str]]:
        """The names of tensors of experts, by layer, in the order of layers: number (None for all) and name -> name."""
        layers: dict[str, dict[tuple[int | None, str], str]] = {}
        for key in self._files:
            if match := _GRANITE.fullmatch(key):
                layers.setdefault(match["layer"], {})[None, _OF_GRANITE[match["name"]]] = key
            elif match := _KEY.fullmatch(key):
                number = None if match["number"] is None else int(match["number"])
                layers.setdefault(match["layer"], {})[number, match["name"]] = key
        return [layers[name] for name in sorted(layers, key=_natural)]

    def _dtype(self) -> torch.dtype:
        """The type of the experts' numbers in the files."""
        for tensors in self._tensors:
            for (_, name), key in tensors.items():
                if name in PARAMETERS or name in _NAMES:
                    with safe_open(self._files[key], "pt") as file:
                        probe: Tensor = file.get_slice(key)[:1]
                        return probe.dtype
        raise ValueError(
            f"the files in {self.path} have no experts' weights under names that are known here, and quantized ones "
            "cannot be served; load the model, and serve what was loaded: lkt.serve_experts(swarm, model)"
        )

    def _model_class(self) -> Any:
        for name in self.config.architectures or ():
            if (found := getattr(transformers, name, None)) is not None:
                return found
        return transformers.AutoModelForCausalLM.from_config


def _files(path: Path) -> dict[str, Path]:
    """Which file of a folder has which tensor. Raises `ValueError` if there are no safetensors files."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: path / Path(name).name for key, name in names.items()}
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    if not found:
        raise ValueError(f"{path} has no safetensors files; load the model and save it with save_pretrained")
    return found


def _natural(text: str) -> list[tuple[int, str]]:
    """A key for sorting in which 10 comes after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
