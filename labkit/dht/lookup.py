"""The iterative parallel look-up: whom to ask next about a key, and when to stop.

A batch comes by here when beam search misses its cache. `Lookup` is the thinking, for one target; `run_lookups` runs
many at once, so that one call to a node carries all the keys that it is asked about.
Source: Kademlia, section 2.3.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

import trio

from labkit.contact import Contact
from labkit.dht.protocol import NodeAnswer
from labkit.wire.transport import Cancellable

if TYPE_CHECKING:
    pass


class _State(Enum):
    NEW = auto()
    WAITING = auto()
    SLOW = auto()  # asked, and late: it no longer holds a slot, but its answer is still welcome
    ANSWERED = auto()
    FAILED = auto()


class _Candidate:
    __slots__ = ("answer", "beside", "contact", "state")

    def __init__(self, contact: Contact) -> None:
        self.contact = contact
        self.state = _State.NEW
        self.beside = False  # asked because it was called anyway: it holds no slot
        self.answer: NodeAnswer | None = None


class Lookup:
    """One look-up. `query` is what is asked: a key (then values are wanted, `quorum` > 0) or an id.

    1. Up to `alpha` of the nearest known nodes are asked at a time, beside those that another search calls anyway, and
    name nodes that are nearer.
    2. When `alpha` answers in a row name nobody nearer than the nearest seen, the rest of the k nearest are asked at
       once (the paper's last round). A search for values that has found one goes on `alpha` at a time.
    3. It is over when the k nearest have answered. Nodes that failed do not count, nor slow ones, if anyone answered.
    4. A search for values is over sooner, when `quorum` nodes have given one and at least one of them is a replica:
       a copy that was cached on the way can be stale, so it never has the word alone.
    """

    __slots__ = ("_candidates", "_given", "_order", "_replica", "_stalled", "alpha", "k", "query", "quorum", "target")

    def __init__(
        self, query: str | bytes, target: int, start: Iterable[Contact], *, k: int, alpha: int, quorum: int = 0
    ) -> None:
        self.query = query
        self.target = target
        self.k = k
        self.alpha = alpha
        self.quorum = quorum
        self._candidates: dict[int, _Candidate] = {}  # by distance to the target, which names a node
        self._order: list[int] = []  # distances, growing
        self._stalled = 0  # answers in a row that named nobody nearer
        self._given = 0  # answers with values, if those are wanted
        self._replica = False  # whether one of them was a replica's
        self._learn(start)

    def next(self) -> list[Contact] | None:
        """Whom to ask now; None when the search is over. They count as asked from here on."""
        near = self._near()
        if self._is_done(near):
            return None
        free = self.k if self._stalled >= self.alpha and not self._given else self.alpha
        free -= sum(candidate.state is _State.WAITING and not candidate.beside for candidate in near)
        chosen = [candidate for candidate in near if candidate.state is _State.NEW][: max(free, 0)]
        for candidate in chosen:
            candidate.state = _State.WAITING
        return [candidate.contact for candidate in chosen]

    def ask_beside(self, contact: Contact) -> bool:
        """Whether to ask a node that is being called for another search: if it may be among the k nearest. Then it
        counts as asked."""
        distance = contact.node_id ^ self.target
        candidate = self._candidates.get(distance)
        if candidate is None or candidate.state is not _State.NEW:
            return False
        if distance > self._order[min(self.k, len(self._order)) - 1]:
            return False
        candidate.state, candidate.beside = _State.WAITING, True
        return True

    def answered(self, contact: Contact, answer: NodeAnswer) -> None:
        """A node answered."""
        candidate = self._candidates[contact.node_id ^ self.target]
        candidate.state = _State.ANSWERED
        candidate.answer = answer
        if self.quorum and answer.items:
            self._given += 1
            self._replica = self._replica or not all(item.cached for item in answer.items)
        nearest = self._order[0]
        self._learn(answer.contacts)
        self._stalled = self._stalled + 1 if self._order[0] == nearest else 0

    def failed(self, contact: Contact) -> None:
        """A node did not answer."""
        self._candidates[contact.node_id ^ self.target].state = _State.FAILED

    def slow(self, contact: Contact) -> None:
        """A node takes its time: the search goes on meanwhile."""
        candidate = self._candidates[contact.node_id ^ self.target]
        if candidate.state is _State.WAITING:
            candidate.state = _State.SLOW

    def _is_done(self, near: Sequence[_Candidate]) -> bool:
        if self.quorum and self._given >= self.quorum and self._replica:
            return True
        if any(candidate.state is not _State.ANSWERED for candidate in near):
            return False
        states = {candidate.state for candidate in self._candidates.values()}
        return _State.ANSWERED in states or _State.SLOW not in states

    def nearest(self, count: int) -> list[Contact]:
        """Up to `count` of those who answered, by growing distance."""
        return [candidate.contact for candidate in self._answered()][:count]

    def answers(self) -> list[NodeAnswer]:
        """All answers, the nearest node's first."""
        return [candidate.answer for candidate in self._answered() if candidate.answer is not None]

    def nearest_without(self) -> Contact | None:
        """The nearest of those who answered without a value: where a found one is cached."""
        for candidate in self._answered():
            if candidate.answer is not None and not candidate.answer.items:
                return candidate.contact
        return None

    def _learn(self, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            distance = contact.node_id ^ self.target
            if distance not in self._candidates:
                self._candidates[distance] = _Candidate(contact)
                insort(self._order, distance)

    def _near(self) -> list[_Candidate]:
        """The k nearest, those who failed or are slow left out."""
        near = []
        for distance in self._order:
            candidate = self._candidates[distance]
            if candidate.state is not _State.FAILED and candidate.state is not _State.SLOW:
                near.append(candidate)
                if len(near) == self.k:
                    break
        return near

    def _answered(self) -> list[_Candidate]:
        candidates = (self._candidates[distance] for distance in self._order)
        return [candidate for candidate in candidates if candidate.state is _State.ANSWERED]


OnAnswers = Callable[[list[NodeAnswer] | None], object]
Ask = Callable[[Contact, list[str | bytes], OnAnswers], Cancellable]


@dataclass(slots=True, eq=False)
class _Call:
    contact: Contact
    searches: list[Lookup]
    started_at: float = 0.0
    slow: bool = False
    under_way: Cancellable | None = None


async def run_lookups(
    searches: Sequence[Lookup], ask: Ask, *, slow_after: float, timeout: float, max_queries: int
) -> list[Contact]:
    """Run searches until all are done, or `timeout` seconds. Returns the nodes that still owed an answer and were late:
    slow, or overtaken by a node that was asked after them.

    `ask(contact, queries, done)` puts up to `max_queries` queries to a node in one call; `done` is told an answer to
    each, or None if there was none. A call that takes more than `slow_after` seconds no longer holds a slot.
    """
    calls: dict[_Call, None] = {}  # in flight, in their order
    changed = list(searches)
    active = dict.fromkeys(searches)  # in their order, so that a simulation is the same twice
    wake = trio.Event()
    last = -math.inf  # when the latest of the calls that were answered had started

    def hear(call: _Call, answers: list[NodeAnswer] | None) -> None:
        nonlocal last
        for index, search in enumerate(call.searches):
            if answers is None:
                search.failed(call.contact)
            else:
                search.answered(call.contact, answers[index])
        if answers is not None:
            last = max(last, call.started_at)
        del calls[call]
        changed.extend(call.searches)
        wake.set()

    try:
        with trio.move_on_after(timeout):
            while True:
                # 1. What do the searches want that have news?
                wake = trio.Event()
                wanted: dict[int, _Call] = {}
                for search in dict.fromkeys(changed):
                    if search not in active:
                        continue
                    chosen = search.next()
                    if chosen is None:
                        del active[search]
                        continue
                    for contact in chosen:
                        wanted.setdefault(contact.node_id, _Call(contact, [])).searches.append(search)
                changed.clear()
                if not active:
                    await trio.lowlevel.checkpoint()
                    break
                # 2. Ask: one call a node, as far as its queries fit into one. Whoever is called is asked by all.
                now = trio.current_time()
                for want in wanted.values():
                    mine = set(want.searches)
                    want.searches += [s for s in active if s not in mine and s.ask_beside(want.contact)]
                    for start in range(0, len(want.searches), max_queries):
                        call = _Call(want.contact, want.searches[start : start + max_queries], now)
                        calls[call] = None
                        call.under_way = ask(
                            call.contact, [search.query for search in call.searches], partial(hear, call)
                        )
                # 3. Wait for news: an answer, or that a call has become slow.
                first = min((call.started_at for call in calls if not call.slow), default=math.inf)
                with trio.move_on_at(first + slow_after):
                    await wake.wait()
                now = trio.current_time()
                for call in calls:
                    if not call.slow and call.started_at + slow_after <= now:
                        call.slow = True
                        for search in call.searches:
                            search.slow(call.contact)
                        changed.extend(call.searches)
        return [call.contact for call in calls if call.slow or call.started_at < last]
    finally:
        for call in calls:
            if call.under_way is not None:
                call.under_way.cancel()
