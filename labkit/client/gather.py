"""Gathering: the requests of one pass under way at once, until every row has what it needs or can't have it any more.

On a batch's way: `client/dispatch` says who is asked for which rows; here all of them are asked and waited for.
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
    """The rows of `choice` [n, k], indices into `experts`, grouped by expert."""
    return [RowGroup(experts[e], rows, slots) for e, rows, slots in group_rows(choice)]


Ask = Callable[[RowGroup, OnDone], ExpertCall]
Take = Callable[[RowGroup, ExpertOutput], None]
Replace = Callable[[Tensor, Tensor], Awaitable[list[RowGroup]]]


class Gathering:
    """The answers to one pass. Each row needs `needed` [n] of them.

    `answered`: bool [n, k], whether a slot has been answered. `failed`: experts that did not answer, by uid, and why.
    """

    # The books are kept in NumPy, which takes a tenth of torch's time for arrays as small as most batches.

    def __init__(self, needed: Tensor, slots: int) -> None:
        self.needed = needed
        self.answered = torch.zeros((len(needed), slots), dtype=torch.bool)
        self._answered = self.answered.numpy()  # the same memory
        self._waiting = np.zeros_like(self._answered)  # slots that may still be answered
        self.failed: dict[str, RPCError] = {}
        self._under_way: dict[RowGroup, ExpertCall | None] = {}
        self._broken: Exception | None = None  # a mistake of ours
        self._changed = trio.Event()

    async def run(
        self, requests: Sequence[RowGroup], ask: Ask, take: Take, patience: float, replace: Replace | None = None
    ) -> None:
        """Ask all at once, and return when none is under way. `take` gets each answer.

        1. Rows whose experts failed, so that they can't have enough answers, get others from `replace`: it is given
        these rows [short] and the free slots [n, k], and returns further requests, none when there is nobody left.
        2. As soon as every row has enough or can't have it, the requests still under way have `patience` seconds left.
        Each request has a deadline of its own, and ends with a kind of `RPCError` like any failure when it is given up.
        """
        needed = self.needed.numpy()
        lost = np.zeros(len(needed), dtype=np.bool_)  # rows that nobody is left for
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
            with trio.move_on_after(patience):  # 2
                while self._under_way and self._broken is None:
                    await self._wait()
            if self._broken is not None:
                raise self._broken
            for call in list(self._under_way.values()):
                if call is not None:
                    call.give_up()
        finally:
            for call in self._under_way.values():
                if call is not None:
                    call.cancel()

    async def _wait(self) -> None:
        """Until a call has ended."""
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
            except Exception as error:  # for the task of this pass, and not for who reads the answers of all
                self._broken = error
        self._changed.set()
