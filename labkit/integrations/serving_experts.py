"""The experts of a Transformers model go to servers: `serve_experts`.

They go as files, one expert at a time, which servers read as they read checkpoints. All experts of a model are one
grid, layers x experts, so that a server holds some of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from labkit.expert_uid import check_name, make_uid
from labkit.integrations.layouts import ExpertLayer, expert_layers, options_of, weights_of
from labkit.launch.handle import ServerHandle
from labkit.paths import user_path
from labkit.server.checkpoints import save_expert
from labkit.server.optimizer import BackendConfig
from labkit.suggest import suggest_options

if TYPE_CHECKING:
    from labkit.swarm import Swarm

KIND = "gated"
COUNTERS = ("updates", "rows", "pending_passes")  # of an expert, at its beginning 0


@suggest_options
def serve_experts(
    swarm: Swarm, model: nn.Module, *, servers: int = 1, name: str | None = None, backups: int = 1,
    backend: BackendConfig | None = None, checkpoint_dir: str | Path | None = None,
    checkpoint_period: float | None = None, isolation: str | None = None, threads: int | None = None,
    label: str = "",
) -> list[ServerHandle]:  # fmt: skip
    """Let servers of a swarm serve the experts of a Transformers model, with the model's weights.

    Expert 17 of the fourth layer that has experts is `<name>.3.17`. The model is not changed:
    `attach` does that.

    Example:
        model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924")
        lkt.serve_experts(swarm, model, servers=4)

    Args:
        swarm: The swarm.
        model: A model of Transformers with experts, all of one kind.
        servers: How many servers share the experts; each gets some of every layer.
        name: The name of their grid, by default that of the kind of model ("olmoe").
        backups: Other servers that keep a copy of each expert, from which one of them goes on
            with it when its server is gone.
        backend: How servers train them, and limits; by default `lk.BackendConfig()`.
        checkpoint_dir: Where they are saved; by default a folder that ends with the swarm.
            Experts that are saved there already, by an earlier training, go on from there.
        checkpoint_period: Seconds between two saves; see `swarm.serve`.
        isolation: "process" (default), or "task" for servers in this process.
        threads: Torch's threads in each server.
        label: A name for these servers, which all see.

    Returns:
        The servers, when their experts can be found.

    Raises:
        ValueError: The model has no experts, or such as are not known here.
        ExpertsTaken: Others serve these experts already.
        ServerFailed: A server did not start.
    """
    layers = expert_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no experts that could be called elsewhere; the mixture models of Transformers "
            "have some, such as Mixtral, Qwen3-MoE or OLMoE"
        )
    name = grid_name_of(model) if name is None else check_name(name)
    grid, options = grid_of(layers), options_of(layers[0])
    folder = swarm.default_checkpoint_dir if checkpoint_dir is None else user_path(checkpoint_dir, "checkpoint_dir")
    write_experts(folder, name, layers)
    return swarm.serve(
        KIND, grid=grid, servers=servers, name=name, backups=backups, backend=backend, checkpoint_dir=checkpoint_dir,
        checkpoint_period=checkpoint_period, isolation=isolation, threads=threads, label=label, **options,
    )  # fmt: skip


def grid_name_of(model: nn.Module) -> str:
    """The name of the grid of a model's experts, after its kind: "olmoe"."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
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


def write_experts(folder: Path, name: str, layers: Sequence[ExpertLayer]) -> None:
    """Write the experts of a model as checkpoints, one at a time; those that are there already stay as they are."""
    for number, layer in enumerate(layers):
        for e in range(layer.count):
            uid = make_uid(name, (number, e))
            if not (folder / f"{uid}.safetensors").exists():
                save_expert(folder, uid, fresh_state(weights_of(layer.module, e)), kind=KIND)


def fresh_state(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state of an expert that has these weights and has learnt nothing here yet."""
    state = {f"module.{name}": tensor for name, tensor in weights.items()}
    return state | {f"counter.{name}": torch.tensor(0) for name in COUNTERS}
