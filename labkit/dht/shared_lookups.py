"""Shared look-ups: those that are under way, which whoever asks for the same key at the same time shares.

Each look-up runs in the task that has begun it. If that task is cancelled, one of those who wait begins anew; an error
reaches all of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from labkit.dht.lookup import Lookup

Query = str | bytes


class _Flight:
    __slots__ = ("done", "error", "landed", "lookup")

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self.done = trio.Event()
        self.landed = False
        self.error: Exception | None = None


class Flights:
    """The look-ups of one node.

    Args:
        run: Runs several look-ups side by side until all are done.
    """

    __slots__ = ("_flights", "_run")

    def __init__(self, run: Callable[[Sequence[Lookup]], Awaitable[None]]) -> None:
        self._run = run
        self._flights: dict[Query, _Flight] = {}

    async def look_up(
        self, wanted: Mapping[Query, Callable[[], Lookup]], quorum: int, *, share: bool = True
    ) -> tuple[dict[Query, Lookup], set[Query]]:
        """Run look-ups, or wait for those that are under way.

        Args:
            wanted: Makes each look-up, by its query.
            quorum: One that is under way will do if it asks at least as many nodes for values.
            share: Whether one that is under way will do at all. It may have begun before the last store elsewhere.

        Returns:
            The look-ups, and the queries of those that this call has run itself.
        """
        found: dict[Query, Lookup] = {}
        own: set[Query] = set()
        missing = set(wanted)
        if not missing:
            await trio.lowlevel.checkpoint()
        while missing:
            theirs = {q: f for q in missing if share and (f := self._flights.get(q)) and f.lookup.quorum >= quorum}
            mine = {query: _Flight(wanted[query]()) for query in wanted if query in missing and query not in theirs}
            if mine:
                await self._fly(mine)
                own |= mine.keys()
                found |= {query: flight.lookup for query, flight in mine.items()}
            for query, flight in theirs.items():
                await flight.done.wait()
                if flight.error is not None:
                    raise flight.error
                if flight.landed:
                    found[query] = flight.lookup
            missing -= found.keys()  # what is left was given up by a task that was cancelled
        return found, own

    async def _fly(self, mine: Mapping[Query, _Flight]) -> None:
        self._flights |= mine
        try:
            await self._run([flight.lookup for flight in mine.values()])
            for flight in mine.values():
                flight.landed = True
        except Exception as error:
            for flight in mine.values():
                flight.error = error
            raise
        finally:
            for query, flight in mine.items():
                if self._flights.get(query) is flight:
                    del self._flights[query]
                flight.done.set()

    def forget(self, keys: Sequence[str]) -> None:
        """Let nobody join the look-ups of these keys that are under way: something was stored since they began."""
        for key in keys:
            self._flights.pop(key, None)
