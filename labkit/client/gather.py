"""Gathering: all requests of one pass at once, until every row has the answers it needs or can't have them any more.

On a batch's way: `client/dispatch` says which expert gets which rows; here all of them are called and waited for.
"""

# n: rows of the batch; k: slots of a row, one for each expert that it is sent to

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
import trio
from torch import Tensor

from labkit.client.beam_search import group_rows
from labkit.client.expert_client import ExpertCall, ExpertOutput, OnDone, Outcome
from labkit.client.overload import pause_before
from labkit.client.patience import Open, Pace, Patience, load_of
from labkit.contact import Contact
from labkit.errors import DeadlineExceeded, MessageTooLarge, NonFiniteTensor, Overloaded, RPCError
from labkit.expert_uid import ExpertInfo

MAX_HALVINGS = 10  # of one request, since a server may refuse whatever we send


@dataclass(frozen=True, eq=False)
class RowGroup:
    """One request: the rows that go to one expert, and the slot of each row that its answer fills."""

    expert: ExpertInfo
    rows: Tensor
    slots: Tensor

    def cut(self, most: int) -> list[RowGroup]:
        """The same as requests of at most so many rows each."""
        if len(self.rows) <= most:
            return [self]
        parts = zip(torch.split(self.rows, most), torch.split(self.slots, most), strict=True)
        return [RowGroup(self.expert, rows, slots) for rows, slots in parts]


def requests_for(experts: Sequence[ExpertInfo], choice: Tensor) -> list[RowGroup]:
    """One request for each expert in `choice` [n, k], which holds indices into `experts`; -1 is no expert."""
    return [RowGroup(experts[e], rows, slots) for e, rows, slots in group_rows(choice)]


Replace = Callable[[Tensor, Tensor], Awaitable[list[RowGroup]]]


class Requests(Protocol):
    """What a pass makes of its requests."""

    def cut(self, request: RowGroup) -> list[RowGroup]:
        """The request as messages that are not too large."""

    def refused(self, request: RowGroup) -> None:
        """Note that this one was too large nevertheless."""

    def ask(self, request: RowGroup, done: OnDone) -> ExpertCall:
        """Begin the call."""

    def take(self, request: RowGroup, answer: ExpertOutput) -> None:
        """Take an answer."""


@dataclass(eq=False)
class _Asked:
    """A request that has not ended: its call, or when it is made again."""

    load_rows: int  # that the pass sends to this server, in all
    since: float  # when it was made first
    started: float = 0.0  # when it was made last
    call: ExpertCall | None = None
    again_at: float | None = None  # the server is overloaded, and is asked again then
    error: Overloaded | None = None  # its last answer, if that was it
    tries: int = 0
    halvings: int = 0  # how often it was cut because its server refused it as too large


@dataclass
class Waited:
    """How a pass has waited: for whom no row needed any more, for how long, and for how long it would have."""

    enough_at: float | None = None
    patience: float = 0.0
    late: list[str] = field(default_factory=list)


class Gathering:
    """The answers to one pass.

    `answered` is bool [n, k]: whether a slot has been answered. `failed` holds the experts that did not answer, by uid,
    and why; `failed_rows` for how many rows each of them did not. Those that left single rows out, whose numbers
    overflowed, are among them, and in `partial`: other rows may still be sent to them.

    Args:
        needed: [n], how many answers each row needs.
        slots: K.
        direction: "forward" or "backward".
        deadline: Of the pass, on trio's clock.
        patience: How long calls are waited for that no row needs any more.
        note: Called with the load of each call that is answered or given up, the seconds, and whether it was answered.
    """

    # The books are kept in NumPy, which takes a tenth of torch's time for arrays as small as most batches.

    def __init__(
        self,
        needed: Tensor,
        slots: int,
        direction: str,
        deadline: float,
        patience: Patience,
        note: Callable[..., None],
    ) -> None:
        self.needed = needed
        self.answered = torch.zeros((len(needed), slots), dtype=torch.bool)
        self.failed: dict[str, RPCError] = {}
        self.failed_rows = Counter[str]()
        self.partial: set[str] = set()
        self.waited = Waited()
        self._answered = self.answered.numpy()  # the same memory
        self._waiting = np.zeros_like(self._answered)  # slots that may still be answered
        self._direction = direction
        self._deadline = deadline
        self._patience = patience
        self._note = note
        self._under_way: dict[RowGroup, _Asked] = {}
        self._sent = Counter[Contact]()  # rows, by server
        self._last: dict[Contact, float] = {}  # when each server answered last
        self._started = self._last_answer = trio.current_time()
        self._gap = 0.0  # the longest time between two answers of one server
        self._broken: Exception | None = None  # raised by `take`: a mistake of ours
        self._changed = trio.Event()

    async def run(self, requests: Sequence[RowGroup], handle: Requests, replace: Replace | None = None) -> None:
        """Make all requests at once, and return when none is under way any more.

        1. Rows that can't have enough answers any more, because their experts failed, get others from `replace`.
        2. As soon as every row has enough answers or can't have them, the requests still under way are waited for with
        patience. Each request has a deadline of its own, too. Either way it ends with a kind of `RPCError`, like any
        failure.

        A server that is overloaded is asked again after a pause (`client/overload`), and one that finds a request too
        large is asked in halves. Both happen beside the steps above.

        Args:
            requests: Those to begin with.
            handle: Cuts requests, begins calls and takes answers.
            replace: Gets the rows that lack answers [short] and the free slots bool [n, k], and returns further
                requests; none when there is no expert left.
        """
        needed = self.needed.numpy()
        lost = np.zeros(len(needed), dtype=np.bool_)  # rows for which no expert is left
        try:
            self._start(requests, handle)
            while self._broken is None:
                taken = self._answered | self._waiting
                possible = taken.sum(1) >= needed
                if replace is not None and not (possible | lost).all():  # 1
                    short = ~possible
                    rows = torch.from_numpy(short.nonzero()[0])
                    requests = await replace(rows, torch.from_numpy(~taken))
                    self._start(requests, handle)
                    for request in requests:
                        short[request.rows.numpy()] = False
                    lost |= short
                    continue
                enough = self._answered.sum(1) >= needed
                if not self._under_way or not (possible & ~enough).any():
                    break
                await self._wait(handle)
            await self._wait_for_the_others(handle)  # 2
            if self._broken is not None:
                raise self._broken
            for request, asked in list(self._under_way.items()):
                self.waited.late.append(request.expert.uid)
                if asked.call is not None:
                    asked.call.time_out()
                elif request in self._under_way:
                    assert asked.error is not None
                    self._fail(request, asked.error)
        finally:
            for asked in list(self._under_way.values()):
                if asked.call is not None:
                    asked.call.cancel()

    async def _wait_for_the_others(self, handle: Requests) -> None:
        now = self.waited.enough_at = trio.current_time()
        until = now
        while self._under_way and self._broken is None:
            pace = Pace(self._started, now, self._last_answer, self._gap)
            calls = [
                Open(load_of(request.expert.contact, self._direction, asked.load_rows), asked.started)
                for request, asked in self._under_way.items()
            ]
            until = self._patience.until(pace, calls)
            self.waited.patience = max(self.waited.patience, min(until, self._deadline) - now)
            if trio.current_time() >= until:
                break
            await self._wait(handle, until)

    async def _wait(self, handle: Requests, until: float = np.inf) -> None:
        """Wait until a call has ended, or until the time is up. Ask those again whose pause is over."""
        pauses = [asked.again_at for asked in self._under_way.values() if asked.again_at is not None]
        with trio.move_on_at(min(until, *pauses) if pauses else until):
            await self._changed.wait()
        self._changed = trio.Event()
        if pauses:
            now = trio.current_time()
            for request, asked in list(self._under_way.items()):
                if asked.again_at is not None and asked.again_at <= now:
                    self._begin(request, asked, handle)

    def _start(self, requests: Sequence[RowGroup], handle: Requests) -> None:
        for request in requests:
            self._sent[request.expert.contact] += len(request.rows)
        now = trio.current_time()
        for whole in requests:
            for request in handle.cut(whole):
                self._waiting[request.rows.numpy(), request.slots.numpy()] = True
                asked = self._under_way[request] = _Asked(self._sent[request.expert.contact], now)
                self._begin(request, asked, handle)

    def _begin(self, request: RowGroup, asked: _Asked, handle: Requests) -> None:
        asked.again_at, asked.started, asked.tries = None, trio.current_time(), asked.tries + 1
        call = handle.ask(request, partial(self._end, request, asked, handle))
        if request in self._under_way and asked.again_at is None:
            asked.call = call

    def _end(self, request: RowGroup, asked: _Asked, handle: Requests, outcome: Outcome) -> None:
        asked.call = None
        contact, now = request.expert.contact, trio.current_time()
        seconds = now - asked.started
        if isinstance(outcome, Overloaded):
            pause = pause_before(asked.tries, asked.since, now, self._deadline, request.expert.uid)
            if pause is not None:
                asked.error, asked.again_at = outcome, now + pause
                self._changed.set()
                return
        if isinstance(outcome, MessageTooLarge) and len(request.rows) > 1 and asked.halvings < MAX_HALVINGS:
            handle.refused(request)
            del self._under_way[request]
            for part in request.cut(-(-len(request.rows) // 2)):
                again = self._under_way[part] = _Asked(asked.load_rows, asked.since, halvings=asked.halvings + 1)
                self._begin(part, again, handle)
        elif isinstance(outcome, RPCError):
            self._fail(request, outcome)
            if isinstance(outcome, DeadlineExceeded):
                self._note(load_of(contact, self._direction, asked.load_rows), seconds, False)
        else:
            self._note(load_of(contact, self._direction, asked.load_rows), seconds, True)
            self._gap = max(self._gap, now - max(asked.started, self._last.get(contact, 0.0)))
            self._last[contact] = self._last_answer = now
            places = self._close(request)
            try:
                handle.take(request, outcome)
                self._answered[places] = True if outcome.overflowed is None else ~outcome.overflowed.numpy()
                if outcome.overflowed is not None:
                    self._leave_out(request, int(outcome.overflowed.sum()))
            except Exception as error:  # raised by `run`, and not in the reader of all answers
                self._broken = error
        self._changed.set()

    def _leave_out(self, request: RowGroup, rows: int) -> None:
        uid = request.expert.uid
        if uid not in self.failed:
            error = NonFiniteTensor(f"finite numbers gave expert {uid} NaN or infinity in {rows} rows")
            self.failed[uid] = error
            self.partial.add(uid)
        self.failed_rows[uid] += rows

    def _fail(self, request: RowGroup, error: RPCError) -> None:
        self._close(request)
        self.failed[request.expert.uid] = error
        self.partial.discard(request.expert.uid)
        self.failed_rows[request.expert.uid] += len(request.rows)

    def _close(self, request: RowGroup) -> tuple[np.ndarray, np.ndarray]:
        places = request.rows.numpy(), request.slots.numpy()
        self._waiting[places] = False
        del self._under_way[request]
        return places
