"""What a runtime has done, counted: for the statistics that a server answers with and dashboards show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from labkit.histogram import Histogram
from labkit.server.backend import ExpertBackend
from labkit.server.task_pool import Task


@dataclass(slots=True)
class ExpertCounts:
    """Of one expert: its optimizer steps; rows and requests answered, and the seconds those took in queue and batch."""

    updates: int = 0
    rows: int = 0
    requests: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RuntimeStatistics:
    """What a runtime has done and what waits. Plain values, for sending.

    `batches`, `rows`, `busy_seconds`: computed. `overloaded`: requests turned away. `expired`: requests whose deadline
    passed while they waited. `uptime`: seconds since it began to run. `…_times`: `labkit.histogram` counts of the
    requests answered.
    """

    queued_requests: int
    queued_rows: int
    batches: int
    rows: int
    busy_seconds: float
    overloaded: int
    expired: int
    uptime: float
    experts: Mapping[str, ExpertCounts]  # by uid; these go on counting
    total_times: list[int]  # queue and batch together
    queue_times: list[int]
    compute_times: list[int]


class Tally:
    """The counters of a runtime. `overloaded`, `expired`: see `RuntimeStatistics`; the runtime counts these itself."""

    def __init__(self, uids: Iterable[str]) -> None:
        self.overloaded = self.expired = 0
        self.started_at: float | None = None
        self._batches = self._rows = 0
        self._busy_seconds = 0.0
        self._experts = {uid: ExpertCounts() for uid in uids}
        self._total_times, self._queue_times, self._compute_times = Histogram(), Histogram(), Histogram()

    def count(self, uid: str, done: Sequence[Task[Any]], started: float, seconds: float) -> int:
        """Count a batch whose requests were answered, none if there were none. Returns its rows."""
        self._busy_seconds += seconds
        if not done:
            return 0
        expert, rows = self._experts[uid], sum(task.rows for task in done)
        self._batches += 1
        self._rows += rows
        expert.rows += rows
        expert.requests += len(done)
        for task in done:
            queued = started - task.arrived
            expert.seconds += queued + seconds
            self._total_times.add(queued + seconds)
            self._queue_times.add(queued)
            self._compute_times.add(seconds)
        return rows

    def statistics(self, backends: Mapping[str, ExpertBackend], requests: int, rows: int) -> RuntimeStatistics:
        """The counters, and what is waiting now."""
        for uid, backend in backends.items():
            self._experts[uid].updates = backend.updates
        return RuntimeStatistics(
            queued_requests=requests,
            queued_rows=rows,
            batches=self._batches,
            rows=self._rows,
            busy_seconds=self._busy_seconds,
            overloaded=self.overloaded,
            expired=self.expired,
            uptime=0.0 if self.started_at is None else trio.current_time() - self.started_at,
            experts=self._experts,
            total_times=list(self._total_times.counts),
            queue_times=list(self._queue_times.counts),
            compute_times=list(self._compute_times.counts),
        )
