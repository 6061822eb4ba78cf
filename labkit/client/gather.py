"""Gathering: the requests of one pass under way at once, until every row has what it needs or can't have it any more.

On a batch's way: `client/dispatch` says who is asked for which rows; here all of them are asked and waited for.
"""

# n: rows of the batch; k: slots of a row, one for each expert that it is sent to

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
import trio
from torch import Tensor

from labkit.client.beam_search import group_rows
from labkit.errors import RPCError
from labkit.expert_uid import ExpertInfo


@dataclass(frozen=True, eq=False)
class Request:
    """One request: the rows that go to one expert, and the slot of each row that its answer fills."""

    expert: ExpertInfo
    rows: Tensor
    slots: Tensor


def requests_for(experts: Sequence[ExpertInfo], choice: Tensor) -> list[Request]:
    """The rows of `choice` [n, k], indices into `experts`, grouped by expert."""
    return [Request(experts[e], rows, slots) for e, rows, slots in group_rows(choice)]


Ask = Callable[[Request, trio.CancelScope], Awaitable[None]]
Replace = Callable[[Tensor, Tensor], Awaitable[list[Request]]]


class Gathering:
    """The answers to one pass. Each row needs `needed` [n] of them.

    `answered`, `waiting`: bool [n, k], whether a slot has been answered, and whether it still may be. `failed`: experts
    that did not answer, by uid, and why.
    """

    def __init__(self, needed: Tensor, slots: int) -> None:
        self.needed = needed
        self.answered = torch.zeros((len(needed), slots), dtype=torch.bool)
        self.waiting = torch.zeros_like(self.answered)
        self.failed: dict[str, RPCError] = {}
        self._under_way: set[trio.CancelScope] = set()
        self._changed = trio.Event()

    async def run(self, requests: Sequence[Request], ask: Ask, patience: float, replace: Replace | None = None) -> None:
        """Ask all at once, and return when none is under way.

        1. Rows whose experts failed, so that they can't have enough answers, get others from `replace`: it is given
        these rows [short] and the free slots [n, k], and returns further requests, none when there is nobody left.
        2. As soon as every row has enough or can't have it, the requests still under way have `patience` seconds left.
        `ask` has its own deadline; it ends early, with a kind of `RPCError` like any failure, when its scope does.
        """
        lost = torch.zeros_like(self.needed, dtype=torch.bool)  # rows that nobody is left for
        async with trio.open_nursery() as nursery:
            self._start(nursery, requests, ask)
            while True:
                possible = (self.answered | self.waiting).sum(1) >= self.needed
                if replace is not None and not (possible | lost).all():  # 1
                    short = ~possible
                    requests = await replace(short.nonzero().squeeze(1), ~(self.answered | self.waiting))
                    self._start(nursery, requests, ask)
                    for request in requests:
                        short[request.rows] = False
                    lost |= short
                    continue
                enough = self.answered.sum(1) >= self.needed
                if not self._under_way or not (possible & ~enough).any():
                    break
                await self._changed.wait()
                self._changed = trio.Event()
            for scope in self._under_way:  # 2
                scope.deadline = trio.current_time() + patience

    def _start(self, nursery: trio.Nursery, requests: Sequence[Request], ask: Ask) -> None:
        for request in requests:
            self.waiting[request.rows, request.slots] = True
            scope = trio.CancelScope()
            self._under_way.add(scope)
            nursery.start_soon(self._attempt, request, ask, scope)

    async def _attempt(self, request: Request, ask: Ask, scope: trio.CancelScope) -> None:
        try:
            await ask(request, scope)
            self.answered[request.rows, request.slots] = True
        except RPCError as error:
            self.failed[request.expert.uid] = error.with_traceback(None)  # which would keep the batch alive
        finally:
            self.waiting[request.rows, request.slots] = False
            self._under_way.remove(scope)
            self._changed.set()
