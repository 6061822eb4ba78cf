"""Dispatch: one pass of an MoE layer over the network, forward or backward. One request per expert and pass.

On a batch's way: `client/moe` enters the lab thread here with rows and grid scores; here the best live experts are
found, the rows are grouped by expert and sent, and what comes back in time is put where it belongs.
"""

# n: rows of the batch; k: k_best, the slots of a row; out: shape of one row's output; short: rows that lack answers

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import trio
from torch import Tensor

from labkit.client.beam_search import Routing, beam_search, empty_routing
from labkit.client.dispatch_config import DispatchConfig as DispatchConfig
from labkit.client.expert_client import ExpertCall, ExpertOutput, OnDone
from labkit.client.following import carried_on
from labkit.client.gather import Gathering, RowGroup, Waited, requests_for
from labkit.client.patience import AdaptivePatience, FixedPatience
from labkit.client.refusals import alike, refused_by_all, tell
from labkit.client.session import Session
from labkit.client.sizes import row_bytes, shape_bytes
from labkit.directory.views import WithBackingOff, WithoutExperts
from labkit.errors import NoExperts, NotEnoughExperts
from labkit.events import PassFinished, RoutingChosen, RowsUnanswered
from labkit.expert_protocol import Direction
from labkit.expert_uid import ExpertInfo
from labkit.wire.frames import encode_request

logger = logging.getLogger(__name__)

MAX_CAUSES = 6  # failures that an error text lists
MAX_ALIKE = 8  # experts that refuse rows for the same reason, after which no further ones are asked


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
    output_shapes: Sequence[tuple[int, ...]],
    keywords: tuple[str, ...] = (),
) -> tuple[Dispatched, list[Tensor]]:
    """Send rows to the best live experts of a grid, and gather their outputs.

    1. find the k best experts of each row; 2. ask each expert once, for all of its rows; 3. a row that can't have
    `k_min` answers any more, because its experts failed, goes to the next best ones at once.

    Args:
        session: The swarm.
        config: How many experts to ask, and how long to wait.
        name: The grid.
        inputs: Each [n, ...].
        grid_scores: One tensor [n, size] for each dimension of the grid.
        output_shapes: Out, the shape of one row, of each output.
        keywords: The names of the last inputs, which the experts get by keyword.

    Returns:
        Which experts were asked, and which answered; and the outputs [n, k, *out], zero where there was no answer.

    Raises:
        NoExperts: The grid has no live expert.
        NotEnoughExperts: A row got fewer than `k_min` answers. With `allow_zero_outputs`, time that runs out raises
            neither.
    """
    encode_request(0, "", 0, None, [tensor[:0] for tensor in inputs])  # a `ValueError` for what can't be sent at all
    n, k = inputs[0].shape[0], config.k_best
    with _Pass(session, config, name, "forward", n, config.forward_timeout) as this:
        routing = await _find_experts(session, config, name, grid_scores, this.deadline)  # 1
        gathering = this.gather(torch.full((n,), config.k_min), k)
        sent = Dispatched(name, routing.experts, routing.choice, routing.coordinates, gathering.answered)
        dtype = inputs[0].dtype
        outputs = [torch.zeros((n, k, *shape), dtype=dtype) for shape in output_shapes]

        def ask(request: RowGroup, done: OnDone) -> ExpertCall:
            return session.experts.forward(
                request.expert, [tensor.index_select(0, request.rows) for tensor in inputs], output_shapes, done,
                timeout=this.deadline - trio.current_time(), codec=config.codec, keywords=keywords,
            )  # fmt: skip

        def take(request: RowGroup, answer: ExpertOutput) -> None:
            for output, tensor in zip(outputs, answer.tensors, strict=True):
                output[request.rows, request.slots] = tensor
            sent.updates.setdefault(request.expert.uid, answer.updates)  # of two answers the older

        def requests(choice: Tensor) -> list[RowGroup]:
            found = requests_for(sent.experts, choice)
            if found:
                rows = {request.expert.uid: len(request.rows) for request in found}
                session.emit(RoutingChosen(prefix=name, rows=rows))
            return found

        async def replace(short: Tensor, free: Tensor) -> list[RowGroup]:
            failed = gathering.failed
            if len(failed) >= MAX_ALIKE and not sent.updates and alike(failed, places_of(sent.experts)):
                return []  # the rest of a large grid would refuse these rows, too
            others = WithoutExperts(session.directory, failed.keys() - gathering.partial)
            most = k + len(gathering.partial)  # of which a row may have asked so many in vain
            with trio.move_on_at(this.deadline):
                found = await beam_search(others, name, [scores[short] for scores in grid_scores], most)
                return requests(_refill(sent, found, short, free))
            return []

        handle = _Handle(session, max(row_bytes(inputs), shape_bytes(output_shapes, dtype)), ask, take)
        await gathering.run(requests(sent.choice), handle, replace)  # 2, 3
        short = this.check(sent)
    gathering.answered[short] = False
    for output in outputs:
        output[short] = 0
    return sent, outputs


async def dispatch_backward(
    session: Session,
    config: DispatchConfig,
    sent: Dispatched,
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    keywords: tuple[str, ...] = (),
    train: bool = True,
) -> list[Tensor | None]:
    """Send each expert that answered the gradients of its outputs, under the same rules.

    An expert whose server was lost since is waited for, where rows need it and there is a copy from which another
    server goes on with it.

    Args:
        session: The swarm.
        config: How long to wait, and for how many.
        sent: The forward pass.
        inputs: Those of the forward pass, each [n, ...].
        grad_outputs: Of each output, [n, k, *out].
        keywords: Those of the forward pass.
        train: Whether the experts learn from it. False asks for the gradients of the inputs only.

    Returns:
        The gradients of the floating-point inputs, and None for others. An expert that fails adds nothing to them.

    Raises:
        NotEnoughExperts: Fewer than `k_min` of the experts that had answered a row answered again.
    """
    grads = [torch.zeros_like(tensor) if tensor.is_floating_point() else None for tensor in inputs]
    totals = [total for total in grads if total is not None]
    with _Pass(session, config, sent.name, "backward", len(inputs[0]), config.backward_timeout) as this:

        def ask(request: RowGroup, done: OnDone) -> ExpertCall:
            return session.experts.backward(
                request.expert, [tensor.index_select(0, request.rows) for tensor in inputs],
                [grad[request.rows, request.slots] for grad in grad_outputs], done,
                timeout=this.deadline - trio.current_time(), codec=config.codec, keywords=keywords,
                forward_updates=sent.updates.get(request.expert.uid), train=train,
            )  # fmt: skip

        answers: list[tuple[RowGroup, Sequence[Tensor]]] = []

        def take(request: RowGroup, answer: ExpertOutput) -> None:
            answers.append((request, answer.tensors))  # 0 in rows that overflowed

        gathering = this.gather(sent.answered.sum(1).clamp(max=config.k_min), config.k_best)
        requests = requests_for(sent.experts, sent.choice.masked_fill(~sent.answered, -1))
        size = row_bytes(inputs) + sum(row_bytes([grad[:, 0]]) for grad in grad_outputs)  # the answer's is less

        async def follow(short: Tensor, free: Tensor) -> list[RowGroup]:
            return await carried_on(session.directory, requests, gathering.failed, short, this.deadline)

        await gathering.run(requests, _Handle(session, size, ask, take), follow)
        this.check(sent)
    # Sums of floats depend on their order, and a run is to be the same again, whoever answers first.
    place = {info.uid: number for number, info in enumerate(sent.experts)}
    for request, tensors in sorted(answers, key=lambda each: place[each[0].expert.uid]):
        for total, grad in zip(totals, tensors, strict=True):
            total.index_add_(0, request.rows, grad)
    return grads


class _Handle:
    """What a pass makes of its requests: see `gather.Requests`. `row_bytes`: of one row, in the larger message."""

    def __init__(
        self,
        session: Session,
        row_bytes: int,
        ask: Callable[[RowGroup, OnDone], ExpertCall],
        take: Callable[[RowGroup, ExpertOutput], None],
    ) -> None:
        self.ask, self.take = ask, take
        self._sizes, self._row_bytes = session.experts.sizes, row_bytes

    def cut(self, request: RowGroup) -> list[RowGroup]:
        return request.cut(self._sizes.most_rows(request.expert.contact, self._row_bytes))

    def refused(self, request: RowGroup) -> None:
        self._sizes.refused(request.expert.contact, len(request.rows) * self._row_bytes)


class _Pass:
    """One pass, for the length of the block: its deadline, its `Gathering`, and what is said about it at its end."""

    def __init__(
        self, session: Session, config: DispatchConfig, name: str, direction: Direction, rows: int, timeout: float
    ) -> None:
        self._session, self._config, self._name, self._direction = session, config, name, direction
        self._rows, self._timeout = rows, timeout
        self._started = trio.current_time()
        self.deadline = self._started + timeout
        self._gathering: Gathering | None = None

    def gather(self, needed: Tensor, slots: int) -> Gathering:
        latencies, after = self._session.experts.latencies, self._config.timeout_after_k_min
        patience = AdaptivePatience(latencies) if after is None else FixedPatience(after)
        self._gathering = Gathering(needed, slots, self._direction, self.deadline, patience, latencies.note)
        return self._gathering

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, *_: object) -> None:
        now, waited = trio.current_time(), Waited() if self._gathering is None else self._gathering.waited
        self._session.emit(
            PassFinished(
                prefix=self._name, direction=self._direction, rows=self._rows, seconds=now - self._started,
                waited=0.0 if waited.enough_at is None else now - waited.enough_at, patience=waited.patience,
                late=tuple(sorted(set(waited.late))),
            )
        )  # fmt: skip

    def check(self, sent: Dispatched) -> Tensor:
        """The rows with too few answers, bool [n]. Raises `NotEnoughExperts` unless such rows are allowed."""
        assert self._gathering is not None
        config, direction, gathering = self._config, self._direction, self._gathering
        answered, failed, places = gathering.answered, gathering.failed, places_of(sent.experts)
        short = answered.sum(1) < gathering.needed
        if short.any():
            self._session.emit(RowsUnanswered(prefix=sent.name, direction=direction, rows=int(short.sum())))
        if not short.any() or config.allow_zero_outputs:
            tell(self._session, sent.name, direction, failed, gathering.failed_rows, places)
            return short
        rows = f"{int(short.sum())} of {len(short)} rows"
        if (refused := refused_by_all(sent.name, direction, failed, places, rows)) is not None:
            raise refused
        helped = sorted({sent.experts[e].uid for e in sent.choice[short][answered[short]].tolist()})
        causes = [f"{uid}: {error.cause} ({error})" for uid, error in sorted(failed.items())]
        more = f"; and {len(causes) - MAX_CAUSES} more" if len(causes) > MAX_CAUSES else ""
        raise NotEnoughExperts(
            f"{rows} got fewer than k_min={config.k_min} answers in a {direction} pass over the grid {sent.name!r}, "
            f"within {self._timeout:g} s. Answered: {', '.join(helped) or 'none'}. "
            + (f"Failed: {'; '.join(causes[:MAX_CAUSES])}{more}" if causes else "No other live expert of it was found")
        )


def places_of(experts: Sequence[ExpertInfo]) -> dict[str, ExpertInfo]:
    """These experts by uid."""
    return {info.uid: info for info in experts}


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
        nobody = NoExperts(
            f"no live expert of the grid {name!r}: {where}; serve some with swarm.serve(name={name!r}, …) or "
            "`labkit serve`, or try again when its servers are back"
        )
        nobody.recoverable = routing is None or session.directory.may_hold(name, len(grid_scores))
        raise nobody
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
        short = NotEnoughExperts(
            f"{rows} of {n} rows find fewer than k_min={config.k_min} live experts in the grid {name!r}: {where}"
        )
        short.recoverable = session.directory.may_hold(name, len(grid_scores), config.k_min)
        raise short
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
