"""The experts in a Transformers model, and how each family lays out their weights.

Every family keeps the experts of a layer in one module, as tensors [experts, …], and says by flags how
(`transformers.integrations.moe`, `use_experts_implementation`). Here they become experts of the kind "gated"
(`server/gated`) and come back. Needs no import of `transformers` itself.

Order: what is found in a model, and the grid that it makes; what its experts compute; their weights, out and in.
"""

# e: number of an expert; hidden: width of input and output; inner: width between

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from labkit.expert_uid import check_name
from labkit.integrations.offloading import numbers_of
from labkit.server.gated import ACTIVATIONS, DTYPES, GATES, apply_gate

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # that Transformers puts on such modules
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
PROBES = 64  # rows with which it is found out what an expert computes between its linear layers


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One layer of a model that has experts.

    Args:
        path: Where its module of experts is in the model: "model.layers.3.mlp.experts".
        module: This module.
        block: The module around it, whose other parameters are those of the router.
    """

    path: str
    module: nn.Module
    block: nn.Module

    @property
    def count(self) -> int:
        """How many experts it has."""
        return int(_weight(self.module, "down_proj").shape[0])

    @property
    def router(self) -> list[nn.Parameter]:
        """The parameters around the experts, those of the router among them."""
        own = {id(parameter) for parameter in self.module.parameters()}
        return [parameter for parameter in self.block.parameters() if id(parameter) not in own]


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """The layers of a model that have experts, in their order; those whose experts are elsewhere, too."""
    found = []
    for path, module in model.named_modules():
        if all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS):
            block = model.get_submodule(path.rpartition(".")[0]) if path else model
            found.append(ExpertLayer(path, module, block))
    return found


def grid_name_of(config: Any) -> str:
    """The name of the grid of the experts of a model with this configuration, after its kind: "olmoe"."""
    kind = str(getattr(config, "model_type", "") or "experts")
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in kind.lower())
    return check_name(plain.strip("-_")[:64] or "experts")


def grid_of(layers: Sequence[ExpertLayer]) -> tuple[int, int]:
    """The sizes of the grid of these layers' experts. Raises `ValueError` unless they are all alike."""
    first, options = layers[0], options_of(layers[0])
    for layer in layers[1:]:
        if layer.count != first.count or options_of(layer) != options:
            raise ValueError(
                f"the experts at {layer.path} ({layer.count} with {options_of(layer)}) differ from those at "
                f"{first.path} ({first.count} with {options}), and all experts of a grid are alike"
            )
    return len(layers), first.count


# ---------------------------------------------------------------- what they compute


def options_of(layer: ExpertLayer) -> dict[str, Any]:
    """The options of the kind "gated" that make such experts.

    Raises `ValueError` for experts that compute something else, or whose weights are not plain numbers.
    """
    module = layer.module
    up, down = _weight(module, _up(module)), _weight(module, "down_proj")
    names = {dtype: name for name, dtype in DTYPES.items()}
    if up.dtype not in names or up.dtype != down.dtype or up.ndim != 3 or down.ndim != 3:
        raise ValueError(
            f"the experts at {layer.path} have weights of {up.dtype} {list(up.shape)} and {down.dtype} "
            f"{list(down.shape)}; needed are float32, bfloat16 or float16 [experts, …], so load the model without "
            "quantization"
        )
    inner, hidden = (down.shape[1], down.shape[2]) if module.is_transposed else (down.shape[2], down.shape[1])
    if up.shape[1 if module.is_transposed else 2] != hidden:
        raise ValueError(f"the experts at {layer.path} do not give as many numbers as they take")
    found = _between(layer, inner, up.dtype)
    return {
        "hidden": int(hidden),
        "inner": int(inner),
        "bias": bool(module.has_bias),
        **found,
        "dtype": names[up.dtype],
    }


def _between(layer: ExpertLayer, inner: int, dtype: torch.dtype) -> dict[str, Any]:
    """Which activation and gate a module has: those that give the same numbers, in its own precision if possible."""
    module: Any = layer.module
    own = module._apply_gate if module.has_gate else module.act_fn
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        x = 8 * torch.randn(PROBES, 2 * inner if module.has_gate else inner, generator=generator)
        laid_out = x if not module.has_gate or module.is_concatenated else _interleaved(x)
        wanted, exact = own(laid_out), own(laid_out.to(dtype))
        fitting = [
            options for options in _candidates(module)
            if torch.allclose(apply_gate(x, **options), wanted, rtol=1e-5, atol=1e-5)
        ]  # fmt: skip
        fitting.sort(key=lambda options: not torch.equal(apply_gate(x.to(dtype), **options), exact))
    if not fitting:
        raise ValueError(
            f"the experts at {layer.path} ({type(module).__name__}) compute something between their linear layers that "
            'the kind "gated" has no option for'
        )
    return {name: value for name, value in fitting[0].items() if value is not None}


def _candidates(module: nn.Module) -> Iterator[dict[str, Any]]:
    """All options of a gate that a module may have, with the numbers that it has itself as limits and factors."""
    if not module.has_gate:
        yield from ({"activation": name, "gate": "none"} for name in ACTIVATIONS)
        return
    numbers = {
        f"{path}.{name}": float(value)
        for path, part in module.named_modules() for name, value in vars(part).items() if type(value) in (int, float)
    }  # fmt: skip
    limits = [value for name, value in numbers.items() if "limit" in name]
    alphas = [value for name, value in numbers.items() if "alpha" in name]
    for gate, activation in product(GATES, ACTIVATIONS):
        if gate in ("plain", "float32"):
            yield {"activation": activation, "gate": gate}
        elif gate in ("clamped", "clamped after"):
            yield from ({"activation": activation, "gate": gate, "limit": limit} for limit in limits)
    for limit, alpha in product(limits, alphas):
        yield {"activation": "silu", "gate": "shifted", "limit": limit, "alpha": alpha}
    caps = [value for name, value in numbers.items() if "cap" in name]
    for limit, alpha in product(caps, caps):
        yield {"activation": "silu", "gate": "softcapped", "limit": limit, "alpha": alpha}


# ---------------------------------------------------------------- their weights


def weights_of(module: nn.Module, e: int) -> dict[str, Tensor]:
    """The parameters of one expert, as the kind "gated" has them: copies, by name."""
    up, down = _numbers(module, _up(module))[e], _numbers(module, "down_proj")[e]
    if module.is_transposed:
        up, down = up.T, down.T
    found = {"up.weight": with_gate_first(module, up), "down.weight": down}
    if module.has_bias:
        found["up.bias"] = with_gate_first(module, _numbers(module, f"{_up(module)}_bias")[e])
        found["down.bias"] = _numbers(module, "down_proj_bias")[e]
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}


def put_weights(module: nn.Module, e: int, weights: Mapping[str, Tensor]) -> None:
    """The way back: write the parameters of one expert into those of a module."""
    up, down = laid_out(module, "up", weights["up.weight"]), weights["down.weight"]
    if module.is_transposed:
        up, down = up.T, down.T
    with torch.no_grad():
        _weight(module, _up(module))[e] = up
        _weight(module, "down_proj")[e] = down
        if module.has_bias:
            _weight(module, f"{_up(module)}_bias")[e] = laid_out(module, "up", weights["up.bias"])
            _weight(module, "down_proj_bias")[e] = weights["down.bias"]


def parameters_of_linear(module: nn.Module) -> dict[str, str]:
    """The names of the parameters that hold all experts' linear layers: "up" and "down" -> name."""
    return {"up": _up(module), "down": "down_proj"}


def laid_out(module: nn.Module, linear: str, rows: Tensor) -> Tensor:
    """What an expert's linear layer ("up" or "down") has for each output, [out, …], in the order that a module has."""
    return _together(module, rows) if linear == "up" else rows


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that are its experts' weights."""
    return {name: p for name, p in module.named_parameters(recurse=False) if name in PARAMETERS}


def _up(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _weight(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{type(module).__name__} has no weights {name!r} of plain numbers")
    return tensor


def _numbers(module: nn.Module, name: str) -> Tensor:
    return numbers_of(module, name, _weight(module, name))


def with_gate_first(module: nn.Module, rows: Tensor) -> Tensor:
    """Rows [2 * inner, …] with those of the gate first, where a module has them in turns."""
    if not module.has_gate or module.is_concatenated:
        return rows
    return torch.cat([rows[::2], rows[1::2]])


def _together(module: nn.Module, rows: Tensor) -> Tensor:
    """The way back."""
    if not module.has_gate or module.is_concatenated:
        return rows
    return torch.stack(list(rows.chunk(2)), dim=1).flatten(0, 1)


def _interleaved(x: Tensor) -> Tensor:
    """[…, 2 * inner] with the gate's half first -> the same in turns."""
    gate, up = x.chunk(2, dim=-1)
    return torch.stack([gate, up], dim=-1).flatten(-2)
