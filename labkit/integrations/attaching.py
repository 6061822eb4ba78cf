"""A Transformers model whose experts live in a swarm: `attach` lets it call them, `detach` brings them home.

transformers calls the experts of all its mixture models through one seam, a function that is chosen by name
(`transformers.integrations.moe`). Ours is called "labkit". It sends rows on the way of `client/chosen`; the weights of
the router are applied here, so that its gradient is exact.
"""

# n: tokens; k: experts of a token; hidden: width of a token

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import trio
from torch import Tensor, nn

from labkit.client.chosen import ChosenExperts
from labkit.client.following import read_where_it_is
from labkit.client.outside_graphs import outside_graphs
from labkit.client.session import find_session
from labkit.errors import LabkitError
from labkit.expert_file import read_expert
from labkit.expert_uid import ExpertInfo
from labkit.integrations.adapters import merged
from labkit.integrations.layouts import (
    ExpertLayer,
    expert_layers,
    grid_name_of,
    grid_of,
    options_of,
    own_parameters,
    put_weights,
)
from labkit.integrations.offloading import device_of_passes, keep_here
from labkit.server.snapshots import fetch_snapshot
from labkit.suggest import suggest_options

if TYPE_CHECKING:
    from labkit.client.session import Session
    from labkit.directory.grids import GridInfo
    from labkit.swarm import Swarm

IMPLEMENTATION = "labkit"  # the name of our function in transformers
Model = Any  # `transformers.PreTrainedModel`, which is not looked into
AT_ONCE = 8  # experts that are read at the same time


class AttachedExperts:
    """What a module of experts has instead of their weights.

    Args:
        experts: Which experts of the swarm they are, and how they are called.
        router: The parameters around them.
        before: The implementation that its model had.
        dropped: What its parameters were: name -> shape, dtype, and whether they were trained.
        lora_scale: The factor of adapters, where servers train some.
    """

    def __init__(
        self, experts: ChosenExperts, router: list[nn.Parameter], before: Any,
        dropped: dict[str, tuple[torch.Size, torch.dtype, bool]], lora_scale: float = 1.0,
    ) -> None:  # fmt: skip
        self.experts, self.router, self.before = experts, router, before
        self.dropped, self.lora_scale = dropped, lora_scale

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()
        self.__dict__ |= state

    def __repr__(self) -> str:
        return f"{self.experts.prefix}.* of the swarm {self.experts.swarm!r}"


@suggest_options
def attach(
    model: Model, swarm: Swarm, *, name: str | None = None, missing: str = "raise",
    train_experts: bool | None = None, timeout: float = 10.0, codec: str | None = None,
) -> Model:  # fmt: skip
    """Let a model call its experts in a swarm. They leave this process; all else stays here.

    The model is used as before: `generate`, a `Trainer`, `lk.fit`, a loop of your own. Where an
    expert's server is lost and others keep copies (`backups`), whoever carries the expert on is
    waited for, within `timeout`; generation needs nothing else, since servers hold no part of it.

    Example:
        lkt.serve_experts(swarm, model, servers=4)
        lkt.attach(model, swarm)
        model.generate(…)

    Args:
        model: A model of Transformers with experts; it is changed.
        swarm: The swarm that has its experts: see `serve_experts`.
        name: The name of their grid, by default that of the kind of model ("olmoe").
        missing: What happens when an expert is gone for good: "raise" (default): the pass raises
            `NotEnoughExperts`. "renormalize": the weights are divided among those that answered.
        train_experts: Whether backward passes train the experts, each by its server's optimizer.
            Default None: those that compute gradients of the router, so not where it is frozen.
        timeout: Seconds that a pass through the experts of one layer may take.
        codec: How tensors are compressed on the wire. Default None: as 16-bit numbers where the
            model's are, which changes none of them. Others are those of `swarm.moe`.

    Returns:
        The model.

    Raises:
        ValueError: The model has no experts, or the swarm has none or others under this name.
    """
    if attached_layers(model):
        raise ValueError("this model's experts are in a swarm already: lkt.detach(model) brings them home first")
    layers = expert_layers(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no experts that could be attached")
    name = grid_name_of(model.config) if name is None else name
    grid = grid_of(layers)
    attached = [
        ChosenExperts(
            name, number, grid, swarm=swarm.name, missing=missing, train=train_experts, timeout=timeout, codec=codec
        )
        for number in range(len(layers))
    ]  # fmt: skip
    lora_scale = float(check_grid(swarm, name, grid, layers).options.get("lora_scale") or 1.0)
    before = model.get_experts_implementation()
    register()
    model.set_experts_implementation(IMPLEMENTATION)
    for layer, experts in zip(layers, attached, strict=True):
        dropped = {n: (p.shape, p.dtype, p.requires_grad) for n, p in own_parameters(layer.module).items()}
        module: Any = layer.module
        module.labkit = AttachedExperts(experts, layer.router, before, dropped, lora_scale)
        module.extra_repr = module.labkit.__repr__  # so that the model says where they are
        for parameter in dropped:
            layer.module.register_parameter(parameter, None)
    gc.collect()
    return model


def check_grid(swarm: Swarm, name: str, grid: tuple[int, int], layers: list[ExpertLayer]) -> GridInfo:
    """The swarm's grid, which has the experts of these layers. Raises `ValueError`."""
    grids = swarm.grids()
    if name not in grids:
        others = f"it has {', '.join(sorted(grids))}" if grids else "it has no grid at all"
        raise ValueError(
            f"the swarm has no grid {name!r} ({others}); serve it: lkt.serve_experts(swarm, model, servers=4)"
        )
    known, options = grids[name], options_of(layers[0])
    other = {key: known.options.get(key) for key, value in options.items() if known.options.get(key, value) != value}
    if known.sizes != grid or known.kind != "gated" or other:
        raise ValueError(
            f"the grid {name!r} of this swarm has {' x '.join(map(str, known.sizes))} experts of the kind "
            f"{known.kind!r} ({known.options}), and this model's are {' x '.join(map(str, grid))} (layers x experts) "
            f"with {options}; give another name=…"
        )
    return known


def detach(model: Model) -> Model:
    """Bring the experts of a model home from its swarm, as they are now, to save it or to go on without the swarm.

    Example:
        lkt.detach(model).save_pretrained("tuned")

    Args:
        model: A model that was attached; it is changed, and has all of its parameters again.

    Returns:
        The model.

    Raises:
        LabkitError: An expert cannot be read. Then the model is still attached.
    """
    layers = attached_layers(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} is not attached to a swarm")
    before = layers[0][1].before
    with TemporaryDirectory(prefix="labkit-experts-") as folder:
        for _, attached in layers:
            session = find_session(attached.experts.swarm)
            session.run(fetch_experts, session, attached.experts, Path(folder))
        for layer, attached in layers:
            keep_here(layer.module)
            device = device_of_passes(layer.block.modules())
            for name, (shape, dtype, trained) in attached.dropped.items():
                parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=trained)
                layer.module.register_parameter(name, parameter)
            for e in range(attached.experts.grid[1]):
                uid = f"{attached.experts.prefix}.{e}"
                path = Path(folder) / f"{uid}.safetensors"
                state, _ = read_expert(path, uid)
                put_weights(layer.module, e, merged(weights_in(state), attached.lora_scale))
                path.unlink()
            del layer.module.labkit, layer.module.extra_repr
    model.set_experts_implementation(before)
    return model


def attached_layers(model: nn.Module) -> list[tuple[ExpertLayer, AttachedExperts]]:
    """The layers of a model whose experts are in a swarm."""
    layers = ((layer, layer.module.__dict__.get("labkit")) for layer in expert_layers(model))
    return [(layer, attached) for layer, attached in layers if isinstance(attached, AttachedExperts)]


def weights_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of an expert, in its state as it was read, by name."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if name.startswith("module.")}


async def fetch_experts(session: Session, experts: ChosenExperts, folder: Path) -> None:
    """Read all experts of a layer into a folder. Raises `LabkitError`."""
    limiter, lost = trio.CapacityLimiter(AT_ONCE), dict[str, LabkitError]()
    uids = [f"{experts.prefix}.{e}" for e in range(experts.grid[1])]
    found = await session.directory.holders(uids)

    async def read(info: ExpertInfo) -> None:
        await fetch_snapshot(session.experts.caller, info.contact, info.uid, folder)

    async def fetch(uid: str) -> None:
        async with limiter:
            try:
                await read_where_it_is(session.directory, found[uid], read)
            except LabkitError as error:
                lost[uid] = error

    async with trio.open_nursery() as nursery:
        for uid in found:
            nursery.start_soon(fetch, uid)
    if missing := sorted({*uids} - found.keys()):
        raise LabkitError(f"the model is still attached, since no server has {', '.join(missing[:4])}")
    if lost:
        uid, error = min(lost.items())
        raise LabkitError(f"the model is still attached, since {uid} could not be read: {error}")


# ---------------------------------------------------------------- the function that transformers calls


@outside_graphs
def labkit_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in the place of a module's experts.

    Args:
        module: The module of the experts.
        hidden_states: [n, hidden].
        top_k_index: Integers [n, k]; the number of experts, or more, means none.
        top_k_weights: [n, k].

    Returns:
        The weighted sum of their outputs, [n, hidden].
    """
    attached = module.__dict__.get("labkit")
    if not isinstance(attached, AttachedExperts):  # of another model with the same configuration
        local: Tensor = type(module).forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights)
        return local
    experts: ChosenExperts = attached.experts
    chosen = top_k_index < experts.grid[1]  # [n, k]
    outputs, answered = experts(hidden_states, top_k_index.masked_fill(~chosen, -1), attached.router)  # [n, k, hidden]
    weights = top_k_weights.masked_fill(~answered, 0)
    if (answered != chosen).any():  # only with missing="renormalize"
        whole, left = top_k_weights.masked_fill(~chosen, 0).sum(1, keepdim=True), weights.sum(1, keepdim=True)
        weights = weights * torch.where(left == 0, 1, whole / left)
    if getattr(module, "has_post_expert_norm", False):
        outputs = module.post_expert_norm(outputs)
    result: Tensor = (outputs * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)
    return result


def register() -> None:
    """Make our function known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # seconds, if no model has been made yet

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, labkit_experts)
