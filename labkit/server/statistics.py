"""What a server says of itself: gauges and counters. They come from a stranger, so all of them are bounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import trio

from labkit.contact import Contact
from labkit.faults import Faults
from labkit.histogram import BUCKETS, Histogram
from labkit.server.backend import ExpertBackend
from labkit.server.task_pool import Task
from labkit.wire.rpc_types import Caller

# Numbers that cannot be make an answer a `BadReply`. (NaN is not >= 0.)
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Uid = Annotated[str, msgspec.Meta(max_length=160)]
PerExpert = msgspec.Meta(max_length=20_000)
Times = Annotated[list[Count], msgspec.Meta(max_length=BUCKETS)]


class ServerStatistics(msgspec.Struct):
    """Gauges and counters of a server, since its start; what `server.statistics` answers.

    `expert_…`: lists in the order of `experts`, of requests that were answered: their rows, how many, and the seconds
    that they took in queue and batch. `…_times`: `labkit.histogram` counts of the same requests. They are empty where
    they come from an older labkit.
    """

    experts: Annotated[dict[Uid, Count], PerExpert]  # uid -> optimizer steps
    queued_requests: Count
    queued_rows: Count
    batches: Count
    rows: Count
    busy_seconds: Seconds
    overloaded: Count
    expired: Count
    latency: Seconds  # injected
    loss: Annotated[float, msgspec.Meta(ge=0, le=1)]  # injected
    uptime: Seconds = 0.0
    expert_rows: Annotated[list[Count], PerExpert] = []
    expert_requests: Annotated[list[Count], PerExpert] = []
    expert_seconds: Annotated[list[Seconds], PerExpert] = []
    total_times: Times = []  # queue and batch together
    queue_times: Times = []
    compute_times: Times = []

    def __post_init__(self) -> None:
        for column in (self.expert_rows, self.expert_requests, self.expert_seconds):
            if column and len(column) != len(self.experts):
                raise ValueError(f"{len(column)} numbers for {len(self.experts)} experts")
        for times in (self.total_times, self.queue_times, self.compute_times):
            if times and len(times) != BUCKETS:
                raise ValueError(f"{len(times)} buckets instead of {BUCKETS}")


def without_experts(statistics: ServerStatistics) -> ServerStatistics:
    """The same, and nothing of single experts."""
    return msgspec.structs.replace(statistics, experts={}, expert_rows=[], expert_requests=[], expert_seconds=[])


async def call_statistics(caller: Caller, contact: Contact, timeout: float) -> ServerStatistics:
    """Ask a server how it is doing. Raises a kind of `RPCError`: `BadReply` for numbers that cannot be."""
    reply = await caller.call(contact, "server.statistics", returns=ServerStatistics, timeout=timeout)
    assert isinstance(reply.body, ServerStatistics)
    return reply.body


def statistics_of(now: RuntimeStatistics, faults: Faults) -> ServerStatistics:
    """Those of a server with this runtime, into which these faults are injected."""
    return ServerStatistics(
        experts={uid: counts.updates for uid, counts in now.experts.items()},
        queued_requests=now.queued_requests,
        queued_rows=now.queued_rows,
        batches=now.batches,
        rows=now.rows,
        busy_seconds=now.busy_seconds,
        overloaded=now.overloaded,
        expired=now.expired,
        latency=faults.latency,
        loss=faults.loss,
        uptime=now.uptime,
        expert_rows=[counts.rows for counts in now.experts.values()],
        expert_requests=[counts.requests for counts in now.experts.values()],
        expert_seconds=[counts.seconds for counts in now.experts.values()],
        total_times=now.total_times,
        queue_times=now.queue_times,
        compute_times=now.compute_times,
    )


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
