"""Dispatch: one pass of an MoE layer over the network, forward or backward. One request per expert and pass.

On a batch's way: `client/moe` enters the lab thread here with rows and grid scores; here the best live experts are
found, the rows are grouped by expert and sent, and what comes back in time is put where it belongs.
"""

# n: rows of the batch; k: k_best, the slots of a row; out: shape of one row's output; short: rows that lack answers

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import trio
from torch import Tensor

from labkit.client.dispatch_config import DispatchConfig as DispatchConfig
from labkit.client.expert_client import ExpertCall, ExpertOutput, OnDone
from labkit.client.following import carried_on
from labkit.client.gather import Gathering, RowGroup, Waited, requests_for
from labkit.client.patience import AdaptivePatience, FixedPatience
from labkit.client.refusals import refused_by_all, tell
from labkit.client.routes import Dispatched as Dispatched
from labkit.client.routes import Routes, Searched, places_of, tell_of
from labkit.client.session import Session
from labkit.client.sizes import row_bytes, shape_bytes
from labkit.errors import NotEnoughExperts
from labkit.events import PassFinished, RowsUnanswered
from labkit.expert_protocol import Direction
from labkit.wire.frames import encode_request

MAX_CAUSES = 6  # failures that an error text lists


async def dispatch_forward(
    session: Session,
    config: DispatchConfig,
    name: str,
    inputs: Sequence[Tensor],
    grid_scores: Sequence[Tensor],
    output_shapes: Sequence[tuple[int, ...]],
    keywords: tuple[str, ...] = (),
) -> tuple[Dispatched, list[Tensor]]:
    """Send rows to the best live experts of a grid, and gather their outputs: see `dispatch_along`.

    Args:
        session: The swarm.
        config: How many experts to ask, and how long to wait.
        name: The grid.
        inputs: Each [n, ...].
        grid_scores: One tensor [n, size] for each dimension of the grid.
        output_shapes: Out, the shape of one row, of each output.
        keywords: The names of the last inputs, which the experts get by keyword.
    """
    routes = Searched(session, config, name, grid_scores)
    return await dispatch_along(session, config, routes, inputs, output_shapes, keywords)


async def dispatch_along(
    session: Session,
    config: DispatchConfig,
    routes: Routes,
    inputs: Sequence[Tensor],
    output_shapes: Sequence[tuple[int, ...]],
    keywords: tuple[str, ...] = (),
) -> tuple[Dispatched, list[Tensor]]:
    """Send rows to experts, and gather their outputs.

    1. find the experts of each row; 2. ask each expert once, for all of its rows; 3. a row that can't have the answers
    it needs any more, because its experts failed, goes to others at once, if the routes lead to any.

    Args:
        session: The swarm.
        config: How long to wait.
        routes: Which experts to ask.
        inputs: Each [n, ...].
        output_shapes: Out, the shape of one row, of each output.
        keywords: The names of the last inputs, which the experts get by keyword.

    Returns:
        Which experts were asked, and which answered; and the outputs [n, k, *out], zero where there was no answer.

    Raises:
        NoExperts: There is no live expert.
        NotEnoughExperts: A row got too few answers. With `allow_zero_outputs`, time that runs out raises neither.
    """
    encode_request(0, "", 0, None, [tensor[:0] for tensor in inputs])  # a `ValueError` for what can't be sent at all
    n, k = inputs[0].shape[0], routes.k
    with _Pass(session, config, routes.name, "forward", n, config.forward_timeout) as this:
        routing = await routes.find(this.deadline)  # 1
        gathering = this.gather(routes.quorum.needed, k)
        found = routing.experts, routing.choice, routing.coordinates
        sent = Dispatched(routes.name, *found, gathering.answered, routes.quorum)
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

        async def replace(short: Tensor, free: Tensor) -> list[RowGroup]:
            return await routes.replace(sent, gathering, short, free, this.deadline)

        handle = _Handle(session, max(row_bytes(inputs), shape_bytes(output_shapes, dtype)), ask, take)
        first = tell_of(session, sent.name, requests_for(sent.experts, sent.choice))
        await gathering.run(first, handle, replace)  # 2, 3
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

        gathering = this.gather(torch.minimum(sent.answered.sum(1), sent.quorum.needed), sent.answered.shape[1])
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
        short = answered.sum(1) < torch.minimum(gathering.needed, sent.quorum.least)
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
            f"{rows} got {sent.quorum.short} in a {direction} pass over the grid {sent.name!r}, within "
            f"{self._timeout:g} s. Answered: {', '.join(helped) or 'none'}. "
            + (f"Failed: {'; '.join(causes[:MAX_CAUSES])}{more}" if causes else "No other live expert of it was found")
        )
