"""Gathering: all requests of one pass at once, until every row has the answers it needs or can't have them any more.

On a batch's way: `client/dispatch` says which expert gets which rows; here all of them are called and waited for.
"""

# n: rows of the batch; k: slots of a row, one for each expert that it is sent to

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import trio
from torch import Tensor

from labkit.client.beam_search import group_rows
from labkit.client.expert_client import ExpertCall, ExpertOutput, OnDone, Outcome
from labkit.errors import RPCError
from labkit.expert_uid import ExpertInfo


@dataclass(frozen=True, eq=False)
class RowGroup:
    """One request: the rows that go to one expert, and the slot of each row that its answer fills."""

    expert: ExpertInfo
    rows: Tensor
    slots: Tensor


def requests_for(experts: Sequence[ExpertInfo], choice: Tensor) -> list[RowGroup]:
    """One request for each expert in `choice` [n, k], which holds indices into `experts`; -1 is no expert."""
    return [RowGroup(experts[e], rows, slots) for e, rows, slots in group_rows(choice)]


Ask = Callable[[RowGroup, OnDone], ExpertCall]
Take = Callable[[RowGroup, ExpertOutput], None]
Replace = Callable[[Tensor, Tensor], Awaitable[list[RowGroup]]]


class Gathering:
    """The answers to one pass.

    `answered` is bool [n, k]: whether a slot has been answered. `failed` holds the experts that did not answer, by uid,
    and why.

    Args:
        needed: [n], how many answers each row needs.
        slots: K.
    """

    # The books are kept in NumPy, which takes a tenth of torch's time for arrays as small as most batches.

    def __init__(self, needed: Tensor, slots: int) -> None:
        self.needed = needed
        self.answered = torch.zeros((len(needed), slots), dtype=torch.bool)
        self._answered = self.answered.numpy()  # the same memory
        self._waiting = np.zeros_like(self._answered)  # slots that may still be answered
        self.failed: dict[str, RPCError] = {}
        self._under_way: dict[RowGroup, ExpertCall | None] = {}
        self._broken: Exception | None = None  # raised by `take`: a mistake of ours
        self._changed = trio.Event()

    async def run(
        self, requests: Sequence[RowGroup], ask: Ask, take: Take, grace_period: float, replace: Replace | None = None
    ) -> None:
        """Make all requests at once, and return when none is under way any more.

        1. Rows that can't have enough answers any more, because their experts failed, get others from `replace`.
        2. As soon as every row has enough answers or can't have them, the requests still under way have `grace_period`
        seconds left. Each request has a deadline of its own, too. Either way it ends with a kind of `RPCError`, like
        any failure.

        Args:
            requests: Those to begin with.
            ask: Begins the call of a request.
            take: Gets each request and its answer.
            grace_period: Seconds that requests may take once they are not needed any more.
            replace: Gets the rows that lack answers [short] and the free slots bool [n, k], and returns further
                requests; none when there is no expert left.
        """
        needed = self.needed.numpy()
        lost = np.zeros(len(needed), dtype=np.bool_)  # rows for which no expert is left
        try:
            self._start(requests, ask, take)
            while self._broken is None:
                taken = self._answered | self._waiting
                possible = taken.sum(1) >= needed
                if replace is not None and not (possible | lost).all():  # 1
                    short = ~possible
                    rows = torch.from_numpy(short.nonzero()[0])
                    requests = await replace(rows, torch.from_numpy(~taken))
                    self._start(requests, ask, take)
                    for request in requests:
                        short[request.rows.numpy()] = False
                    lost |= short
                    continue
                enough = self._answered.sum(1) >= needed
                if not self._under_way or not (possible & ~enough).any():
                    break
                await self._wait()
            with trio.move_on_after(grace_period):  # 2
                while self._under_way and self._broken is None:
                    await self._wait()
            if self._broken is not None:
                raise self._broken
            for call in list(self._under_way.values()):
                if call is not None:
                    call.time_out()
        finally:
            for call in self._under_way.values():
                if call is not None:
                    call.cancel()

    async def _wait(self) -> None:
        """Wait until a call has ended."""
        await self._changed.wait()
        self._changed = trio.Event()

    def _start(self, requests: Sequence[RowGroup], ask: Ask, take: Take) -> None:
        for request in requests:
            self._waiting[request.rows.numpy(), request.slots.numpy()] = True
            self._under_way[request] = None
            call = ask(request, partial(self._end, request, take))
            if request in self._under_way:
                self._under_way[request] = call

    def _end(self, request: RowGroup, take: Take, outcome: Outcome) -> None:
        places = request.rows.numpy(), request.slots.numpy()
        self._waiting[places] = False
        del self._under_way[request]
        if isinstance(outcome, RPCError):
            self.failed[request.expert.uid] = outcome
        else:
            try:
                take(request, outcome)
                self._answered[places] = True
            except Exception as error:  # raised by `run`, and not in the reader of all answers
                self._broken = error
        self._changed.set()
