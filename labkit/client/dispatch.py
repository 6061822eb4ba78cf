"""Dispatch: one pass of an MoE layer over the network, forward or backward. One request per expert and pass.

On a batch's way: `client/moe` enters the lab thread here with rows and grid scores; here the best live experts are
found, the rows are grouped by expert and sent, and what comes back in time is put where it belongs.
"""

# n: rows of the batch; k: k_best, the slots of a row; out: shape of one row's output

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import trio
from torch import Tensor

from labkit.client.beam_search import Routing, beam_search, group_rows
from labkit.client.session import Session
from labkit.directory import Children, Directory
from labkit.errors import NoExperts, NotEnoughExperts, RPCError
from labkit.events import RoutingChosen, RowsUnanswered
from labkit.expert_uid import ExpertInfo


@dataclass(frozen=True)
class DispatchConfig:
    """How long to wait for experts, and for how many. Times in seconds, all finite.

    Each row waits for `k_min` answers; when every row has them, or can have no more, the pass waits
    `timeout_after_k_min` longer for the rest, and never past `forward_timeout` / `backward_timeout`.
    """

    k_best: int = 4
    k_min: int = 1
    forward_timeout: float = 10.0
    backward_timeout: float = 10.0
    timeout_after_k_min: float = 1.0
    allow_zero_outputs: bool = False
    codec: str = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.k_min <= self.k_best:
            raise ValueError(f"k_min={self.k_min}, k_best={self.k_best}: needs 1 <= k_min <= k_best")
        for name in ("forward_timeout", "backward_timeout", "timeout_after_k_min"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and (seconds > 0 or (seconds == 0 and name == "timeout_after_k_min"))):
                raise ValueError(f"{name}={seconds!r}: a finite number of seconds above 0")


@dataclass(frozen=True)
class Dispatched:
    """A forward pass: who was asked for each slot, where that expert stands in the grid, and what it answered."""

    name: str
    experts: list[ExpertInfo]
    choice: Tensor  # int64 [n, k], index into `experts`, -1 where nobody was left to ask
    coordinates: Tensor  # int64 [n, k, dims]
    outputs: Tensor  # [n, k, *out], zeros where `answered` is False
    answered: Tensor  # bool [n, k]


async def dispatch_forward(
    session: Session,
    config: DispatchConfig,
    name: str,
    inputs: Sequence[Tensor],
    grid_scores: Sequence[Tensor],
    output_shape: tuple[int, ...],
) -> Dispatched:
    """Send `inputs` (each [n, ...]) to the best live experts of the grid `name` and gather their outputs.

    1. find the k best experts of each row; 2. ask each expert once, for all of its rows; 3. rows that are short of
    `k_min` answers because their experts failed go to the next best ones, while there is time.
    Raises `NoExperts` if the grid has none, `NotEnoughExperts` if a row got fewer than `k_min` answers.
    """
    deadline = trio.current_time() + config.forward_timeout
    n, k = inputs[0].shape[0], config.k_best
    routing = await beam_search(session.directory, name, grid_scores, k)  # 1
    if n and not routing.experts:
        raise NoExperts(f"no live expert of the grid {name!r}: {await session.directory.explain(name)}")
    experts, choice, coordinates = routing.experts, routing.choice.clone(), routing.coordinates.clone()
    alive = int((choice >= 0).sum(1).min()) if n else k
    if alive < k:
        session.say_once(
            f"k_best={k}, but only {alive} live experts were found for some rows of the grid {name!r}: "
            f"{await session.directory.explain(name)}"
        )
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
    outputs = torch.zeros((n, k, *output_shape), dtype=dtype)
    answered = torch.zeros((n, k), dtype=torch.bool)
    failed: dict[str, RPCError] = {}

    async def ask(group: _Group, give_up: trio.CancelScope) -> None:
        part = [tensor[group.rows] for tensor in inputs]
        timeout = deadline - trio.current_time()
        answer = await session.experts.forward(
            group.expert, part, output_shape, timeout=timeout, codec=config.codec, give_up=give_up
        )
        outputs[group.rows, group.slots] = answer.tensors[0].to(dtype)
        answered[group.rows, group.slots] = True

    groups = [_Group(experts[e], rows, slots) for e, rows, slots in group_rows(choice)]
    while groups:
        session.emit(RoutingChosen(prefix=name, rows={group.expert.uid: len(group.rows) for group in groups}))
        await _gather(groups, ask, answered, config, failed)  # 2
        short = torch.nonzero(answered.sum(1) < config.k_min).squeeze(1)
        if not len(short) or trio.current_time() >= deadline:
            break
        others = _Without(session.directory, failed)
        again = await beam_search(others, name, [scores[short] for scores in grid_scores], k)  # 3
        groups = _refill(again, short, experts, choice, coordinates, answered)
    needed = torch.full((n,), config.k_min)
    _check(session, config, name, "forward", answered, needed, choice, experts, failed)
    return Dispatched(name, experts, choice, coordinates, outputs, answered)


async def dispatch_backward(
    session: Session, config: DispatchConfig, sent: Dispatched, inputs: Sequence[Tensor], grad_outputs: Tensor
) -> list[Tensor | None]:
    """Send each expert that answered the gradients of its outputs (`grad_outputs`: [n, k, *out]), under the same rules.

    Returns the gradients of the floating-point inputs, None for others. An expert that fails adds nothing to them.
    """
    deadline = trio.current_time() + config.backward_timeout
    grads = [torch.zeros_like(tensor) if tensor.is_floating_point() else None for tensor in inputs]
    answered = torch.zeros_like(sent.answered)
    failed: dict[str, RPCError] = {}

    async def ask(group: _Group, give_up: trio.CancelScope) -> None:
        part, grad = [tensor[group.rows] for tensor in inputs], grad_outputs[group.rows, group.slots]
        timeout = deadline - trio.current_time()
        answer = await session.experts.backward(
            group.expert, part, grad, timeout=timeout, codec=config.codec, give_up=give_up
        )
        returned = iter(answer.tensors)
        for total in grads:
            if total is not None:
                total.index_add_(0, group.rows, next(returned).to(total.dtype))
        answered[group.rows, group.slots] = True

    choice = sent.choice.masked_fill(~sent.answered, -1)
    groups = [_Group(sent.experts[e], rows, slots) for e, rows, slots in group_rows(choice)]
    await _gather(groups, ask, answered, config, failed)
    needed = sent.answered.sum(1).clamp(max=config.k_min)
    _check(session, config, sent.name, "backward", answered, needed, choice, sent.experts, failed)
    return grads


# ---------------------------------------------------------------- asking many


@dataclass(frozen=True)
class _Group:
    """One request: the rows that go to one expert, and the slot of each row that its answer fills."""

    expert: ExpertInfo
    rows: Tensor
    slots: Tensor


async def _gather(
    groups: Sequence[_Group],
    ask: Callable[[_Group, trio.CancelScope], Awaitable[None]],
    answered: Tensor,
    config: DispatchConfig,
    failed: dict[str, RPCError],
) -> None:
    """Ask all groups at once. Each call ends by itself, at the pass's deadline at the latest; those that are still
    under way `timeout_after_k_min` after every row had what it needs are given up."""
    waiting = torch.zeros_like(answered)  # slots that may still be answered
    for group in groups:
        waiting[group.rows, group.slots] = True
    under_way: dict[str, trio.CancelScope] = {group.expert.uid: trio.CancelScope() for group in groups}
    changed = trio.Event()

    async def attempt(group: _Group) -> None:
        nonlocal changed
        uid = group.expert.uid
        try:
            await ask(group, under_way[uid])
        except RPCError as error:
            failed[uid] = error
        finally:
            del under_way[uid]
            waiting[group.rows, group.slots] = False
            changed.set()

    async with trio.open_nursery() as nursery:
        for group in groups:
            nursery.start_soon(attempt, group)
        while under_way and not ((answered.sum(1) >= config.k_min) | ~waiting.any(1)).all():
            await changed.wait()
            changed = trio.Event()
        if under_way:
            patience = trio.current_time() + config.timeout_after_k_min
            for scope in under_way.values():
                scope.deadline = patience


def _refill(
    again: Routing, short: Tensor, experts: list[ExpertInfo], choice: Tensor, coordinates: Tensor, answered: Tensor
) -> list[_Group]:
    """Put other experts into the slots of the `short` rows that nobody answered. Returns the requests to make."""
    offset = len(experts)
    experts += again.experts
    fresh = torch.full_like(choice, -1)
    for place, row in enumerate(short.tolist()):
        asked = {experts[e].uid for e in choice[row][answered[row]].tolist()}
        free = torch.nonzero(~answered[row]).squeeze(1).tolist()
        offers = [
            (e, at)
            for e, at in zip(again.choice[place].tolist(), again.coordinates[place], strict=True)
            if e >= 0 and again.experts[e].uid not in asked
        ]
        for slot, (e, at) in zip(free, offers, strict=False):
            choice[row, slot] = fresh[row, slot] = offset + e
            coordinates[row, slot] = at
    return [_Group(experts[e], rows, slots) for e, rows, slots in group_rows(fresh)]


class _Without:
    """A directory in which some experts are not."""

    def __init__(self, directory: Directory, uids: Collection[str]) -> None:
        self._directory = directory
        self._uids = uids

    def cached(self, prefixes: Iterable[str]) -> dict[str, Children]:
        return {prefix: self._filter(found) for prefix, found in self._directory.cached(prefixes).items()}

    async def children(self, prefixes: Iterable[str]) -> dict[str, Children]:
        return {prefix: self._filter(found) for prefix, found in (await self._directory.children(prefixes)).items()}

    def _filter(self, found: Children) -> Children:
        return Children(found.inner, {c: info for c, info in found.experts.items() if info.uid not in self._uids})


def _check(
    session: Session,
    config: DispatchConfig,
    name: str,
    direction: str,
    answered: Tensor,
    needed: Tensor,
    choice: Tensor,
    experts: Sequence[ExpertInfo],
    failed: Mapping[str, RPCError],
) -> None:
    """Raise `NotEnoughExperts`, with names and causes, if a row has fewer answers than it needs."""
    short = answered.sum(1) < needed
    if not short.any():
        return
    session.emit(RowsUnanswered(prefix=name, direction=direction, rows=int(short.sum())))
    if config.allow_zero_outputs:
        return
    asked = sorted({experts[e].uid for e in choice[short].unique().tolist() if e >= 0})
    causes = [f"{uid}: {failed[uid].cause} ({failed[uid]})" for uid in asked if uid in failed]
    more = f" and {len(causes) - 6} more" if len(causes) > 6 else ""
    raise NotEnoughExperts(
        f"{int(short.sum())} of {len(needed)} rows got fewer than {int(needed[short].max())} answers in a {direction} "
        f"pass from the grid {name!r}. "
        + (f"Failed: {'; '.join(causes[:6])}{more}" if causes else f"Alive were only {', '.join(asked) or 'none'}")
    )
