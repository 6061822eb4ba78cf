"""The experts of a Transformers model go to servers: `serve_experts`.

They go as files, one expert at a time, which servers read as they read checkpoints. All experts of a model are one
grid, layers x experts, so that a server holds some of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from labkit.expert_uid import check_name, split_uid
from labkit.integrations.adapters import fresh_adapters, lora_options
from labkit.integrations.layouts import ExpertLayer, expert_layers, grid_name_of, grid_of, options_of, weights_of
from labkit.launch.handle import ServerHandle
from labkit.paths import user_path
from labkit.server.optimizer import BackendConfig

if TYPE_CHECKING:
    from labkit.swarm import Swarm

KIND = "gated"


def serve_experts(
    swarm: Swarm, model: nn.Module | str | Path, *, servers: int = 1, experts: int | None = None,
    name: str | None = None, backups: int = 1, backend: BackendConfig | None = None,
    checkpoint_dir: str | Path | None = None, isolation: str | None = None, lora: Any = None, **options: Any,
) -> list[ServerHandle]:  # fmt: skip
    """Let servers of a swarm serve the experts of a Transformers model, with the model's weights.

    Expert 17 of the fourth layer that has experts is `<name>.3.17`. The model is not changed:
    `attach` does that.

    Example:
        model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924")
        lkt.serve_experts(swarm, model, servers=4)

    Args:
        swarm: The swarm.
        model: A model of Transformers with experts, all of one kind; or the folder where one was
            saved, from which experts are read one at a time.
        servers: How many servers share the experts; each gets some of every layer.
        experts: How many experts that nobody serves yet to take; by default all of these.
        name: The name of their grid, by default that of the kind of model ("olmoe").
        backups: Other servers that keep a copy of each expert, from which one of them goes on
            with it when its server is gone; one more keeps a copy in reserve, which is older.
        backend: How servers train them, and limits; by default `lk.BackendConfig()`.
        checkpoint_dir: Where they are saved; by default a folder that ends with the swarm.
            Experts that are saved there already, by an earlier training, go on from there.
        isolation: "process" (default), or "task" for servers in this process.
        lora: The rank of adapters (LoRA), or a `peft.LoraConfig`, whose `r`, `lora_alpha` and
            `use_rslora` count, or the folder of adapters that were saved, to go on with those.
            Servers then train adapters of both linear layers of each expert, and freeze its
            weights; `detach` adds them up, `save_adapters` saves them. Default None: all of it is
            trained, or what is trained of experts of the same grid that others serve already.
            Where the router here is frozen, as `peft` does, `attach` needs train_experts=True.
        **options: Others of `swarm.serve`, such as `threads`, `label` or `on`.

    Returns:
        The servers, when their experts can be found.

    Raises:
        ValueError: The model has no experts, or such as are not known here.
        ExpertsTaken: Others serve these experts already.
        ServerFailed: A server did not start.
    """
    source = _source(model)
    name = grid_name_of(source.config) if name is None else check_name(name)
    grid = grid_of(source.layers)
    running, saved = swarm.grids().get(name), None
    if isinstance(lora, str | Path):
        from labkit.integrations.adapter_folders import FolderOfAdapters

        saved = FolderOfAdapters(user_path(lora, "lora"), source.model)
        lora = saved.config
    adapters = lora_options(lora, None if running is None else running.options)

    def initial(uid: str) -> Mapping[str, Tensor]:
        number, e = split_uid(uid)[1]
        found = source.weights(number, e)
        if saved is not None:
            return {**found, **saved.of(number, e)}
        return {**found, **fresh_adapters(uid, found, adapters["lora"])} if adapters else found

    given = {**options_of(source.layers[0]), **adapters, **options}
    return swarm.serve(
        KIND, grid=grid, servers=servers, experts=experts, name=name, backups=backups, backend=backend,
        checkpoint_dir=checkpoint_dir, isolation=isolation, initial=initial, **given,
    )  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """Where experts come from.

    Args:
        model: The model, or one like it without numbers.
        layers: Its layers with experts.
        config: Its configuration.
        weights: Returns the weights of an expert, by its layer and number.
    """

    model: nn.Module
    layers: list[ExpertLayer]
    config: Any
    weights: Callable[[int, int], Mapping[str, Tensor]]


def _source(model: nn.Module | str | Path) -> _Source:
    """A model, or a folder with one, as a source of experts. Raises `ValueError`."""
    if isinstance(model, nn.Module):
        layers = expert_layers(model)
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no experts that could be called elsewhere; the mixture models of "
                "Transformers have some, such as Mixtral, Qwen3-MoE or OLMoE"
            )
        config = getattr(model, "config", None)
        return _Source(model, layers, config, lambda number, e: weights_of(layers[number].module, e))
    from labkit.integrations.model_folders import ModelFolder

    folder = ModelFolder(user_path(model, "model"))
    return _Source(folder.model, folder.layers, folder.config, folder.weights)
