"""Telemetry: events in, bounded counters out. What the rich repr and the progress bar show.

Calls are counted in the lab thread, which emits all of them; reading from another thread sees numbers that are each
right, if not all of the same instant.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from labkit.events import CallFailed, CallFinished, Event, RowsUnanswered, ServerLost

MAX_TRACKED = 10_000  # servers, and experts


@dataclass(slots=True)
class Calls:
    """Calls to one server, or to one expert. `last_answer`: seconds, monotonic; None before the first."""

    finished: int = 0
    seconds: float = 0.0
    updates: int = 0
    last_answer: float | None = None
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def mean_seconds(self) -> float:
        """Mean time of a call that was answered."""
        return self.seconds / self.finished if self.finished else 0.0


class Telemetry:
    """Counts of calls and failures by cause: in all, by server address and by expert uid."""

    def __init__(self) -> None:
        self.total = Calls()
        self.by_address: dict[str, Calls] = {}
        self.by_uid: dict[str, Calls] = {}
        self.servers_lost = 0
        self.unanswered_rows = 0  # in forward passes

    def __call__(self, event: Event) -> None:
        """Take an event; it is an `Emit`."""
        if isinstance(event, CallFinished):
            for calls in self._places(event.address, event.uid):
                calls.finished += 1
                calls.seconds += event.seconds
                calls.updates = max(calls.updates, event.updates)
                calls.last_answer = event.at
        elif isinstance(event, CallFailed):
            for calls in self._places(event.address, event.uid):
                calls.failed[event.cause] += 1
        elif isinstance(event, ServerLost):
            self.servers_lost += 1
        elif isinstance(event, RowsUnanswered) and event.direction == "forward":
            self.unanswered_rows += event.rows

    def _places(self, address: str, uid: str) -> list[Calls]:
        places = [self.total]
        for table, key in ((self.by_address, address), (self.by_uid, uid)):
            if key not in table and len(table) >= MAX_TRACKED:
                del table[next(iter(table))]
            places.append(table.setdefault(key, Calls()))
        return places
