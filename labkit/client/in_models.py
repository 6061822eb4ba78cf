"""What in a model calls experts elsewhere, and which: layers over grids, single experts, and experts that were chosen.

No batch passes here. Training and saving ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from labkit.client.chosen import ChosenExperts
from labkit.client.expert import RemoteExpert
from labkit.client.moe import MixtureOfExperts

CHOSEN = "labkit"  # the attribute of a module that has `ChosenExperts` in its attribute `experts`


def swarms_of(model: nn.Module) -> list[str]:
    """The names of the swarms that a model calls, that of the first layer first; none if it calls no experts."""
    return list(dict.fromkeys(layer.swarm for _, layer in _layers(model)))


def grids_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The grids that a model's layers call, by name, with their sizes."""
    return {layer.name: layer.grid for _, layer in _layers(model) if not isinstance(layer, RemoteExpert)}


def single_experts_of(model: nn.Module) -> list[str]:
    """The uids of the experts that a model calls by themselves."""
    return sorted({layer.uid for _, layer in _layers(model) if isinstance(layer, RemoteExpert)})


def move_to(model: nn.Module, swarm: str) -> nn.Module:
    """Let a model call the experts of the swarm of this name. Returns the model."""
    for module, layer in list(_layers(model)):
        if isinstance(layer, ChosenExperts):
            holder: Any = module.__dict__[CHOSEN]
            holder.experts = replace(layer, swarm=swarm)
        else:
            layer.swarm = swarm
    return model


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, MixtureOfExperts | RemoteExpert | ChosenExperts]]:
    for module in model.modules():
        chosen = getattr(module.__dict__.get(CHOSEN), "experts", None)
        if isinstance(module, (MixtureOfExperts, RemoteExpert)):
            yield module, module
        elif isinstance(chosen, ChosenExperts):
            yield module, chosen
