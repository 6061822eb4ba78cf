"""The experts in a folder where a Transformers model was saved, read one at a time.

No process ever holds all of them: safetensors files are read lazily. How the tensors there become a model's parameters,
Transformers knows for each family (`conversion_mapping`): some have the experts of a layer in one tensor each, others
each expert by itself, under names of their own. Of what it does for all experts of a layer, this does one expert's
share; of quantized ones, it makes the plain numbers that experts learn with. Importing this imports transformers.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from labkit.integrations.layouts import FLAGS, PARAMETERS, expert_layers, weights_of


@dataclass
class _Source:
    """Where the numbers of one parameter of a layer's experts are.

    Args:
        convert: What Transformers makes the parameter of them with; None if they are the parameter.
        keys: The names of the tensors, in their order, by the pattern that they have there.
    """

    convert: Any
    keys: dict[str, list[str]] = field(default_factory=dict)


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
        with torch.device("meta"):
            self.model: Any = model_class(self.config)(self.config)
        self.model.to(getattr(self.config, "dtype", None))
        self.layers = expert_layers(self.model)
        if not self.layers:
            raise ValueError(f"the model in {path}, a {type(self.model).__name__}, has no experts that could be served")
        self._sources = self._find()
        self.layers = expert_layers(self.model.to(self._dtype()))

    def weights(self, number: int, e: int) -> dict[str, Tensor]:
        """The parameters of one expert as the kind "gated" has them: expert `e` of the layer `number`."""
        layer = self.layers[number]
        flags = {flag: getattr(layer.module, flag) for flag in FLAGS}
        sources = self._sources[layer.path]
        parameters = {name: self._parameter(f"{layer.path}.{name}", sources[name], e) for name in sources}
        return weights_of(SimpleNamespace(**flags, **parameters), 0)  # type: ignore[arg-type]

    def _parameter(self, name: str, source: _Source, e: int) -> Tensor:
        """One expert's share of a parameter, [1, …]."""
        if source.convert is None:
            ((key,),) = source.keys.values()
            return self._read(key, e)
        convert = copy.deepcopy(source.convert)
        for pattern, keys in source.keys.items():
            alone = "*" in pattern  # a tensor for each expert
            convert.add_tensor(name, keys[0], pattern, self._read(keys[e]) if alone else self._read(keys[0], e))
        made = convert.convert(name, model=_WithOneExpert(self.model), config=self.config)
        value = next(iter(made.values()))
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def _read(self, key: str, e: int | None = None) -> Tensor:
        """A tensor; with `e`, what is that expert's of a tensor [experts, …], as [1, …]."""
        with safe_open(self._files[key], "pt") as file:
            lazily = file.get_slice(key)
            tensor: Tensor = lazily[e : e + 1] if e is not None and lazily.get_shape() else file.get_tensor(key)
            return tensor

    def _find(self) -> dict[str, dict[str, _Source]]:
        """Where the numbers of experts are, by layer and parameter. Raises `ValueError`."""
        transforms = get_model_conversion_mapping(self.model, hf_quantizer=self._quantizer())
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        wanted = self.model.state_dict()
        own = {
            f"{layer.path}.{name}": (layer.path, name)
            for layer in self.layers for name in PARAMETERS if getattr(layer.module, name, None) is not None
        }  # fmt: skip
        found: dict[str, dict[str, _Source]] = {layer.path: {} for layer in self.layers}
        for key in sorted(self._files, key=_natural):
            prefix = self.model.base_model_prefix
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = key, None
            if target in own:
                path, name = own[target]
                convert = None if pattern is None else by_pattern[pattern]
                source = found[path].setdefault(name, _Source(convert))
                source.keys.setdefault(pattern or "", []).append(key)
        if lacking := [target for target, (path, name) in own.items() if name not in found[path]]:
            raise ValueError(
                f"the files in {self.path} have nothing for {lacking[0]} that Transformers {transformers.__version__} "
                "knows of; load the model, and serve what was loaded: lkt.serve_experts(swarm, model)"
            )
        for layer in self.layers:
            for pattern, keys in ((p, keys) for s in found[layer.path].values() for p, keys in s.keys.items()):
                if "*" in pattern and len(keys) != layer.count:  # the number of an expert is its place among them
                    raise ValueError(
                        f"the files in {self.path} have {pattern} of {len(keys)} of the {layer.count} experts at "
                        f"{layer.path}; a file may be missing"
                    )
        return found

    def _quantizer(self) -> Any:
        """What makes plain numbers of quantized ones, as Transformers does; None if they are plain."""
        try:
            how = plain_quantization(self.config)
            return None if how is None else AutoHfQuantizer.from_config(how, pre_quantized=True)
        except (ImportError, ValueError) as error:
            raise ValueError(f"the experts in {self.path} are quantized, and cannot be read here: {error}") from error

    def _dtype(self) -> torch.dtype:
        """The type of the experts' numbers in the files."""
        source = self._sources[self.layers[0].path]["down_proj"]
        dtype = self._parameter(f"{self.layers[0].path}.down_proj", source, 0).dtype
        if not dtype.is_floating_point:
            raise ValueError(
                f"the experts in {self.path} are quantized ({dtype}), and such cannot be served; load the model, and "
                "serve what was loaded: lkt.serve_experts(swarm, model)"
            )
        return dtype


def model_class(config: Any) -> Any:
    """The class of the model that has this configuration: the one that was saved, or for writing text."""
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def plain_quantization(config: Any) -> dict[str, Any] | None:
    """How a model was quantized, to be read as plain numbers if that is possible; None if it was not quantized."""
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    own = saved if isinstance(saved, dict) else saved.to_dict()
    can = hasattr(AutoQuantizationConfig.from_dict(own), "dequantize")
    return {**own, "dequantize": True} if can else own


class _WithOneExpert:
    """A model as conversions see it, in which every layer has a single expert."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Any:
        """The first expert's share of a parameter."""
        return self._model.get_parameter(name)[:1]


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
