"""The iterative parallel look-up: which nodes to ask next about a key, and when to stop.

On a batch's way this runs when beam search misses its cache. `Lookup` decides, for one target, and does no I/O;
`run_lookups` runs many at once, so that one call to a node carries all the keys that it is asked about.
Source: Kademlia, section 2.3.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

import trio

from labkit.contact import Contact
from labkit.dht.protocol import NodeAnswer
from labkit.wire.transport import Cancellable


class _State(Enum):
    NEW = auto()
    WAITING = auto()
    SLOW = auto()  # asked, and late: it no longer counts against `alpha`, but its answer is still welcome
    ANSWERED = auto()
    FAILED = auto()


class _Candidate:
    __slots__ = ("answer", "contact", "piggybacked", "state")

    def __init__(self, contact: Contact) -> None:
        self.contact = contact
        self.state = _State.NEW
        self.piggybacked = False  # asked in a call for another look-up: it does not count against `alpha`
        self.answer: NodeAnswer | None = None


class Lookup:
    """The state of one look-up.

    1. Up to `alpha` of the nearest known nodes are asked at a time, and name nodes that are nearer. Nodes that are
       called for another look-up anyway are asked as well.
    2. When `alpha` answers in a row name no node nearer than the nearest seen, the rest of the k nearest are asked at
       once (the paper's last round). A look-up of values that has found one goes on with `alpha` at a time.
    3. The look-up is done when the k nearest have answered. Nodes that failed do not count, nor do slow ones if any
       node has answered.
    4. A look-up of values is done sooner, when `quorum` nodes have returned some and at least one of them is a replica:
       a copy that was cached on the way may be stale, so it is never enough alone.

    Args:
        query: What nodes are asked for: a key, for its values, or an id (20 bytes), for the nodes near to it.
        target: The 160-bit id that the look-up is after.
        start: The nodes to begin with.
        k: How many of the nearest nodes have to answer.
        alpha: How many nodes to ask at a time.
        quorum: How many nodes have to return values; 0 if no values are wanted.
    """

    __slots__ = (
        "_candidates", "_order", "_replica_answered", "_stalled", "_value_answers", "alpha", "k", "query", "quorum",
        "target",
    )  # fmt: skip

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
        self._stalled = 0  # answers in a row that named no nearer node
        self._value_answers = 0  # answers with values, if values are wanted
        self._replica_answered = False  # whether one of these was a replica's
        self._add_candidates(start)

    def next(self) -> list[Contact] | None:
        """Returns the nodes to ask now, which count as asked from here on; None when the look-up is done."""
        near = self._nearest_candidates()
        if self._is_done(near):
            return None
        free = self.k if self._stalled >= self.alpha and not self._value_answers else self.alpha
        free -= sum(candidate.state is _State.WAITING and not candidate.piggybacked for candidate in near)
        chosen = [candidate for candidate in near if candidate.state is _State.NEW][: max(free, 0)]
        for candidate in chosen:
            candidate.state = _State.WAITING
        return [candidate.contact for candidate in chosen]

    def piggyback(self, contact: Contact) -> bool:
        """Whether to ask a node that is being called for another look-up anyway: if it may be among the k nearest.

        If so, it counts as asked.
        """
        distance = contact.node_id ^ self.target
        candidate = self._candidates.get(distance)
        if candidate is None or candidate.state is not _State.NEW:
            return False
        if distance > self._order[min(self.k, len(self._order)) - 1]:
            return False
        candidate.state, candidate.piggybacked = _State.WAITING, True
        return True

    def answered(self, contact: Contact, answer: NodeAnswer) -> None:
        """Take a node's answer."""
        candidate = self._candidates[contact.node_id ^ self.target]
        candidate.state = _State.ANSWERED
        candidate.answer = answer
        if self.quorum and answer.items:
            self._value_answers += 1
            self._replica_answered = self._replica_answered or not all(item.cached for item in answer.items)
        nearest = self._order[0]
        self._add_candidates(answer.contacts)
        self._stalled = self._stalled + 1 if self._order[0] == nearest else 0

    def failed(self, contact: Contact) -> None:
        """Note that a node did not answer."""
        self._candidates[contact.node_id ^ self.target].state = _State.FAILED

    def slow(self, contact: Contact) -> None:
        """Note that a node is late: the look-up goes on meanwhile."""
        candidate = self._candidates[contact.node_id ^ self.target]
        if candidate.state is _State.WAITING:
            candidate.state = _State.SLOW

    def _is_done(self, near: Sequence[_Candidate]) -> bool:
        if self.quorum and self._value_answers >= self.quorum and self._replica_answered:
            return True
        if any(candidate.state is not _State.ANSWERED for candidate in near):
            return False
        states = {candidate.state for candidate in self._candidates.values()}
        return _State.ANSWERED in states or _State.SLOW not in states

    def nearest(self, count: int) -> list[Contact]:
        """Returns up to `count` of the nodes that answered, by growing distance."""
        return [candidate.contact for candidate in self._answered()][:count]

    def named(self, count: int) -> list[Contact]:
        """Returns up to `count` of the nodes that are known or were named, and have not failed, by growing distance."""
        candidates = (self._candidates[distance] for distance in self._order)
        return [one.contact for one in candidates if one.state is not _State.FAILED][:count]

    def answers(self) -> list[NodeAnswer]:
        """Returns all answers, the nearest node's first."""
        return [candidate.answer for candidate in self._answered() if candidate.answer is not None]

    def nearest_without(self) -> Contact | None:
        """Returns the nearest node that answered without a value: the one to cache a found value at."""
        for candidate in self._answered():
            if candidate.answer is not None and not candidate.answer.items:
                return candidate.contact
        return None

    def _add_candidates(self, contacts: Iterable[Contact]) -> None:
        for contact in contacts:
            distance = contact.node_id ^ self.target
            if distance not in self._candidates:
                self._candidates[distance] = _Candidate(contact)
                insort(self._order, distance)

    def _nearest_candidates(self) -> list[_Candidate]:
        """Returns the k nearest candidates, except those that failed or are slow."""
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


OnAnswers = Callable[[list[NodeAnswer] | None], object]  # called with an answer to each query, or None if a call failed
AskNode = Callable[[Contact, list[str | bytes], OnAnswers], Cancellable]
FindNodes = Callable[[Sequence[int]], Awaitable[dict[int, list[Contact]]]]  # ids -> for each the k nearest nodes


@dataclass(slots=True, eq=False)
class _Call:
    contact: Contact
    lookups: list[Lookup]
    started_at: float = 0.0
    slow: bool = False
    under_way: Cancellable | None = None


async def run_lookups(
    lookups: Sequence[Lookup], ask: AskNode, *, slow_after: float, timeout: float, max_queries: int
) -> list[Contact]:
    """Run look-ups until all are done, or for `timeout` seconds.

    Args:
        lookups: The look-ups; they hold the results.
        ask: `ask(contact, queries, done)` puts queries to a node in one call. `done` is called with an answer to each,
            or with None if the node did not answer.
        slow_after: Seconds after which a call no longer counts against `alpha`.
        timeout: Seconds.
        max_queries: How many queries fit into one call.

    Returns:
        The nodes that still owed an answer and were late: Slow, or overtaken by a node that was asked after them.
    """
    calls: dict[_Call, None] = {}  # in flight, in their order
    changed = list(lookups)  # look-ups that have news
    active = dict.fromkeys(lookups)  # in their order, so that a simulation can be repeated exactly
    wake = trio.Event()
    latest_answered = -math.inf  # when the latest of the calls that were answered had started

    def on_answers(call: _Call, answers: list[NodeAnswer] | None) -> None:
        nonlocal latest_answered
        for index, lookup in enumerate(call.lookups):
            if answers is None:
                lookup.failed(call.contact)
            else:
                lookup.answered(call.contact, answers[index])
        if answers is not None:
            latest_answered = max(latest_answered, call.started_at)
        del calls[call]
        call.under_way = None  # else the two would refer to each other
        changed.extend(call.lookups)
        wake.set()

    try:
        with trio.move_on_after(timeout):
            while True:
                # 1. Which nodes do the look-ups that have news want to ask?
                wake = trio.Event()
                wanted: dict[int, _Call] = {}
                for lookup in dict.fromkeys(changed):
                    if lookup not in active:
                        continue
                    chosen = lookup.next()
                    if chosen is None:
                        del active[lookup]
                        continue
                    for contact in chosen:
                        wanted.setdefault(contact.node_id, _Call(contact, [])).lookups.append(lookup)
                changed.clear()
                if not active:
                    await trio.lowlevel.checkpoint()
                    break
                # 2. Ask them, in one call for each node if its queries fit. All look-ups ask a node that is called.
                now = trio.current_time()
                for want in wanted.values():
                    mine = set(want.lookups)
                    want.lookups += [other for other in active if other not in mine and other.piggyback(want.contact)]
                    for start in range(0, len(want.lookups), max_queries):
                        call = _Call(want.contact, want.lookups[start : start + max_queries], now)
                        calls[call] = None
                        queries = [lookup.query for lookup in call.lookups]
                        under_way = ask(call.contact, queries, partial(on_answers, call))
                        if call in calls:
                            call.under_way = under_way
                # 3. Wait for news: an answer, or a call that has become slow.
                first = min((call.started_at for call in calls if not call.slow), default=math.inf)
                with trio.move_on_at(first + slow_after):
                    await wake.wait()
                now = trio.current_time()
                for call in calls:
                    if not call.slow and call.started_at + slow_after <= now:
                        call.slow = True
                        for lookup in call.lookups:
                            lookup.slow(call.contact)
                        changed.extend(call.lookups)
        return [call.contact for call in calls if call.slow or call.started_at < latest_answered]
    finally:
        for call in calls:
            if call.under_way is not None:
                call.under_way.cancel()
                call.under_way = None
