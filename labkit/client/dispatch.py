"""Dispatch: one pass of an MoE layer over the network, forward or backward. One request per expert and pass.

On a batch's way: `client/moe` enters the lab thread here with rows and grid scores; here the best live experts are
found, the rows are grouped by expert and sent, and what comes back in time is put where it belongs.
"""

# n: rows of the batch; k: k_best, the slots of a row; out: shape of one row's output; short: rows that lack answers

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import trio
from torch import Tensor

from labkit.client.beam_search import Routing, beam_search, empty_routing
from labkit.client.expert_client import ExpertCall, ExpertOutput, OnDone
from labkit.client.gather import Gathering, RowGroup, requests_for
from labkit.client.session import Session
from labkit.directory.views import WithBackingOff, WithoutExperts
from labkit.errors import NoExperts, NotEnoughExperts
from labkit.events import RoutingChosen, RowsUnanswered
from labkit.expert_uid import ExpertInfo
from labkit.wire.compression import CODECS
from labkit.wire.frames import encode_request

logger = logging.getLogger(__name__)

MAX_CAUSES = 6  # failures that an error text lists


@dataclass(frozen=True)
class DispatchConfig:
    """How many experts a row is sent to, and how long it waits for them.

    Times are in seconds, and finite. Each row waits for `k_min` answers. When every row has
    them, or can't have them any more, the pass waits `timeout_after_k_min` longer for the
    others.

    Example:
        swarm.moe(256, grid=(4, 4), k_best=4, k_min=2, forward_timeout=5.0)

    Args:
        k_best: Experts that each row is sent to. Default 4.
        k_min: Answers that each row needs, 1 to `k_best`. Default 1.
        forward_timeout: Longest time of a forward pass. Default 10.
        backward_timeout: Longest time of a backward pass. Default 10.
        timeout_after_k_min: Time left to experts that no row needs any more; may be 0.
            Default 1.
        allow_zero_outputs: What happens to a row with fewer than `k_min` answers. False
            (default): the pass raises `NotEnoughExperts`. True: the output of the row is
            zero.
        codec: How tensors are compressed on the wire: "none" (default), "float16" or
            "bfloat16" (half of float32), or "blockwise8" (a quarter). All but "none" round
            the numbers.

    Raises:
        ValueError: A value is out of its range.
    """

    k_best: int = 4
    k_min: int = 1
    forward_timeout: float = 10.0
    backward_timeout: float = 10.0
    timeout_after_k_min: float = 1.0
    allow_zero_outputs: bool = False
    codec: str = "none"

    def __post_init__(self) -> None:
        if not (isinstance(self.k_min, int) and isinstance(self.k_best, int)):
            raise ValueError(f"k_min={self.k_min!r}, k_best={self.k_best!r}: whole numbers")
        if not 1 <= self.k_min <= self.k_best:
            raise ValueError(f"k_min={self.k_min}, k_best={self.k_best}: needs 1 <= k_min <= k_best")
        for name in ("forward_timeout", "backward_timeout", "timeout_after_k_min"):
            seconds = getattr(self, name)
            may_be_none = name == "timeout_after_k_min"
            if not (math.isfinite(seconds) and (seconds > 0 or (seconds == 0 and may_be_none))):
                least = "of at least 0" if may_be_none else "above 0"
                raise ValueError(f"{name}={seconds!r}: a finite number of seconds {least}")
        if self.codec not in CODECS:
            raise ValueError(f"codec={self.codec!r}: one of {', '.join(CODECS)}")


@dataclass(frozen=True)
class Dispatched:
    """A forward pass: which expert was asked for each slot, its place in the grid, and whether it answered.

    `name` is the grid's. `updates` are the optimizer steps that the experts had made when they answered, by uid.
    """

    name: str
    experts: list[ExpertInfo]  # each once
    choice: Tensor  # int64 [n, k], index into `experts`, -1 where no expert was left to ask
    coordinates: Tensor  # int64 [n, k, dims]
    answered: Tensor  # bool [n, k]
    updates: dict[str, int] = field(default_factory=dict)


async def dispatch_forward(
    session: Session,
    config: DispatchConfig,
    name: str,
    inputs: Sequence[Tensor],
    grid_scores: Sequence[Tensor],
    output_shape: tuple[int, ...],
) -> tuple[Dispatched, Tensor]:
    """Send rows to the best live experts of a grid, and gather their outputs.

    1. find the k best experts of each row; 2. ask each expert once, for all of its rows; 3. a row that can't have
    `k_min` answers any more, because its experts failed, goes to the next best ones at once.

    Args:
        session: The swarm.
        config: How many experts to ask, and how long to wait.
        name: The grid.
        inputs: Each [n, ...].
        grid_scores: One tensor [n, size] for each dimension of the grid.
        output_shape: Out, the shape of one row's output.

    Returns:
        Which experts were asked, and which answered; and the outputs [n, k, *out], zero where there was no answer.

    Raises:
        NoExperts: The grid has no live expert.
        NotEnoughExperts: A row got fewer than `k_min` answers. With `allow_zero_outputs`, time that runs out raises
            neither.
    """
    encode_request(0, "", 0, None, [tensor[:0] for tensor in inputs])  # a `ValueError` for what can't be sent at all
    n, k = inputs[0].shape[0], config.k_best
    deadline = trio.current_time() + config.forward_timeout
    routing = await _find_experts(session, config, name, grid_scores, deadline)  # 1
    gathering = Gathering(torch.full((n,), config.k_min), k)
    sent = Dispatched(name, routing.experts, routing.choice, routing.coordinates, gathering.answered)
    outputs = torch.zeros((n, k, *output_shape), dtype=inputs[0].dtype)

    def ask(request: RowGroup, done: OnDone) -> ExpertCall:
        return session.experts.forward(
            request.expert, [tensor.index_select(0, request.rows) for tensor in inputs], output_shape, done,
            timeout=deadline - trio.current_time(), codec=config.codec,
        )  # fmt: skip

    def take(request: RowGroup, answer: ExpertOutput) -> None:
        outputs[request.rows, request.slots] = answer.tensors[0]
        sent.updates.setdefault(request.expert.uid, answer.updates)  # of two answers the older

    def requests(choice: Tensor) -> list[RowGroup]:
        found = requests_for(sent.experts, choice)
        if found:
            session.emit(RoutingChosen(prefix=name, rows={request.expert.uid: len(request.rows) for request in found}))
        return found

    async def replace(short: Tensor, free: Tensor) -> list[RowGroup]:
        others = WithoutExperts(session.directory, gathering.failed)
        with trio.move_on_at(deadline):
            found = await beam_search(others, name, [scores[short] for scores in grid_scores], k)
            return requests(_refill(sent, found, short, free))
        return []

    await gathering.run(requests(sent.choice), ask, take, config.timeout_after_k_min, replace)  # 2, 3
    short = _check(session, config, sent, "forward", gathering)
    gathering.answered[short] = False
    outputs[short] = 0
    return sent, outputs


async def dispatch_backward(
    session: Session, config: DispatchConfig, sent: Dispatched, inputs: Sequence[Tensor], grad_outputs: Tensor
) -> list[Tensor | None]:
    """Send each expert that answered the gradients of its outputs, under the same rules.

    Args:
        session: The swarm.
        config: How long to wait, and for how many.
        sent: The forward pass.
        inputs: Those of the forward pass, each [n, ...].
        grad_outputs: [n, k, *out].

    Returns:
        The gradients of the floating-point inputs, and None for others. An expert that fails adds nothing to them.

    Raises:
        NotEnoughExperts: Fewer than `k_min` of the experts that had answered a row answered again.
    """
    deadline = trio.current_time() + config.backward_timeout
    grads = [torch.zeros_like(tensor) if tensor.is_floating_point() else None for tensor in inputs]
    totals = [total for total in grads if total is not None]

    def ask(request: RowGroup, done: OnDone) -> ExpertCall:
        return session.experts.backward(
            request.expert, [tensor.index_select(0, request.rows) for tensor in inputs],
            grad_outputs[request.rows, request.slots], done, timeout=deadline - trio.current_time(),
            codec=config.codec, forward_updates=sent.updates.get(request.expert.uid),
        )  # fmt: skip

    def take(request: RowGroup, answer: ExpertOutput) -> None:
        for total, grad in zip(totals, answer.tensors, strict=True):
            total.index_add_(0, request.rows, grad)

    gathering = Gathering(sent.answered.sum(1).clamp(max=config.k_min), config.k_best)
    requests = requests_for(sent.experts, sent.choice.masked_fill(~sent.answered, -1))
    await gathering.run(requests, ask, take, config.timeout_after_k_min)
    _check(session, config, sent, "backward", gathering)
    return grads


async def _find_experts(
    session: Session, config: DispatchConfig, name: str, grid_scores: Sequence[Tensor], deadline: float
) -> Routing:
    """Beam search, until the deadline. Where too few experts are left, those on back-off are considered, too.

    Raises `NoExperts` if none was found, or `NotEnoughExperts` if some row has fewer than `k_min` live experts. If some
    row has fewer than `k_best`, that is logged once. All say what was looked up, and where. A search that takes too
    long finds no experts, which is an error unless `allow_zero_outputs` is set.
    """
    n, k = len(grid_scores[0]), config.k_best
    where = f"{name!r} could not be looked up in time"
    routing: Routing | None = None
    with trio.move_on_at(deadline):
        try:
            routing = await beam_search(session.directory, name, grid_scores, k)
        except ValueError as error:
            raise ValueError(
                f"the gate of the grid {name!r} gave no usable scores: {error}; is the input finite?"
            ) from None
        if n and int((routing.choice >= 0).sum(1).min()) < config.k_min:
            routing = await beam_search(WithBackingOff(session.directory), name, grid_scores, k)
        if n and not routing.experts:
            # Asking the DHT for the reason may find experts that were declared since the cache was filled.
            where = await session.directory.explain(name)
            routing = await beam_search(session.directory, name, grid_scores, k)
    if routing is None and config.allow_zero_outputs:
        return empty_routing(n, k, len(grid_scores))
    if routing is None or (n and not routing.experts):
        raise NoExperts(
            f"no live expert of the grid {name!r}: {where}; serve some with swarm.serve(name={name!r}, …) or "
            "`labkit serve`, or try again when its servers are back"
        )
    alive = (routing.choice >= 0).sum(1)  # [n]
    fewest = int(alive.min()) if n else k
    too_few = fewest < config.k_min and not config.allow_zero_outputs
    first_time = fewest < k and session.first_time(f"fewer than k_best {name}")
    if too_few or first_time:
        with trio.move_on_at(deadline):
            where = await session.directory.explain(name)
    if too_few:
        rows = int((alive < config.k_min).sum())
        session.emit(RowsUnanswered(prefix=name, direction="forward", rows=rows))
        raise NotEnoughExperts(
            f"{rows} of {n} rows find fewer than k_min={config.k_min} live experts in the grid {name!r}: {where}"
        )
    if first_time:
        logger.warning("k_best=%d, but some rows find only %d live experts in the grid %r (%s)", k, fewest, name, where)
    return routing


def _refill(sent: Dispatched, found: Routing, short: Tensor, free: Tensor) -> Tensor:
    """Put the experts of `found` (rows: `short`) into the `free` [n, k] slots. Returns only those choices, [n, k]."""
    # 1. Number them as in `sent`. An expert that is there already is asked once more, but gets one backward request.
    numbers = {info.uid: number for number, info in enumerate(sent.experts)}
    for info in found.experts:
        number = numbers.setdefault(info.uid, len(sent.experts))
        sent.experts[number : number + 1] = [info]
    index = torch.tensor([numbers[info.uid] for info in found.experts] + [-1])
    offers = index[found.choice]  # [short, k]
    # 2. Leave out the experts that the row has asked already.
    fresh = (offers >= 0) & ~(offers[:, :, None] == sent.choice[short][:, None, :]).any(2)
    # 3. The first offer goes to the first free slot, and so on.
    offer = torch.argsort(~fresh, dim=1, stable=True)
    slot = torch.argsort(~free[short], dim=1, stable=True)
    pairs = torch.minimum(fresh.sum(1), free[short].sum(1))  # [short]
    row, nth = torch.nonzero(torch.arange(free.shape[1]) < pairs[:, None], as_tuple=True)
    offer, slot, at = offer[row, nth], slot[row, nth], short[row]
    added = torch.full_like(sent.choice, -1)
    added[at, slot] = sent.choice[at, slot] = offers[row, offer]
    sent.coordinates[at, slot] = found.coordinates[row, offer]
    return added


def _check(session: Session, config: DispatchConfig, sent: Dispatched, direction: str, gathering: Gathering) -> Tensor:
    """The rows with too few answers, bool [n]. Raises `NotEnoughExperts` unless such rows are allowed."""
    answered, failed = gathering.answered, gathering.failed
    short = answered.sum(1) < gathering.needed
    if not short.any():
        return short
    session.emit(RowsUnanswered(prefix=sent.name, direction=direction, rows=int(short.sum())))
    if config.allow_zero_outputs:
        return short
    helped = sorted({sent.experts[e].uid for e in sent.choice[short][answered[short]].tolist()})
    causes = [f"{uid}: {error.cause} ({error})" for uid, error in sorted(failed.items())]
    more = f"; and {len(causes) - MAX_CAUSES} more" if len(causes) > MAX_CAUSES else ""
    timeout = config.forward_timeout if direction == "forward" else config.backward_timeout
    raise NotEnoughExperts(
        f"{int(short.sum())} of {len(short)} rows got fewer than k_min={config.k_min} answers in a {direction} pass "
        f"over the grid {sent.name!r}, within {timeout:g} s. Answered: {', '.join(helped) or 'none'}. "
        + (f"Failed: {'; '.join(causes[:MAX_CAUSES])}{more}" if causes else "No other live expert of it was found")
    )
