"""What a server says of itself: the counters of its runtime, and the statistics that are made of them and sent.

Beside a batch's way: `server/runtime` counts each batch here, and those who watch the swarm ask with
`call_statistics`. The numbers come from a stranger, so all of them are bounded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import trio

from labkit.contact import Contact
from labkit.expert_protocol import MAX_LABEL, STATISTICS, Count, Seconds, clean_label
from labkit.histogram import BUCKETS, Histogram
from labkit.server.backend import ExpertBackend
from labkit.server.task_pool import Task
from labkit.wire.rpc_types import Caller

Uid = Annotated[str, msgspec.Meta(max_length=160)]
PerExpert = msgspec.Meta(max_length=20_000)
MAX_TAKEOVERS = 64  # that a server tells of, the last ones; and hand-overs
Times = Annotated[list[Count], msgspec.Meta(max_length=BUCKETS)]


class RecentTakeOver(msgspec.Struct, frozen=True):
    """An expert that a server has taken over: see `labkit.events.ExpertTakenOver`.

    Args:
        uid: The expert.
        before: `host:port` of the server that had it.
        epoch: The expert's epoch since then.
        lost_updates: Optimizer steps that the copy lacked, as far as they are known.
        seconds: How long nobody served the expert.
        ago: Seconds since then.
    """

    uid: Uid
    before: Annotated[str, msgspec.Meta(max_length=4 * MAX_LABEL)]
    epoch: Count
    lost_updates: Count
    seconds: Seconds
    ago: Seconds

    def __post_init__(self) -> None:
        if not (self.uid.isprintable() and self.before.isprintable()):
            raise ValueError("an expert or a server with an unprintable name")


class RecentHandOver(msgspec.Struct, frozen=True):
    """An expert that a server was given by another one: see `labkit.events.ExpertHandedOver`.

    Args:
        uid: The expert.
        before: `host:port` of the server that gave it.
        epoch: The expert's epoch since then.
        ago: Seconds since then.
    """

    uid: Uid
    before: Annotated[str, msgspec.Meta(max_length=4 * MAX_LABEL)]
    epoch: Count
    ago: Seconds

    def __post_init__(self) -> None:
        if not (self.uid.isprintable() and self.before.isprintable()):
            raise ValueError("an expert or a server with an unprintable name")


class CopyStatistics(msgspec.Struct):
    """How a server takes part in copies of experts: gauges, and counters since its start.

    Args:
        backups: How many copies each of its experts is to have at other servers; 0 for a spare server that makes none.
        kept: Copies of others' experts that it keeps, without those in reserve.
        copied: How many of its experts have a fresh copy at another server.
        at_risk: How many are to have one, and have none that is fresh.
        period: Seconds between two copies of an expert that learns, as promised: nine, or as many as all of its experts
            take, by their size and the budget of bytes; 0 if it makes no copies.
        sent_bytes: Bytes of copies that it has sent.
        adopted: Its experts that it did not begin with: they were taken over, or given to it.
        takeovers: The last experts that it has taken over, the latest last.
        handovers: The last experts that other servers have given it, the latest last; those may be gone.
    """

    backups: Count = 0
    kept: Count = 0
    copied: Count = 0
    at_risk: Count = 0
    period: Seconds = 0.0
    sent_bytes: Count = 0
    adopted: Annotated[list[Uid], PerExpert] = []
    takeovers: Annotated[list[RecentTakeOver], msgspec.Meta(max_length=MAX_TAKEOVERS)] = []
    handovers: Annotated[list[RecentHandOver], msgspec.Meta(max_length=MAX_TAKEOVERS)] = []


class ServerStatistics(msgspec.Struct):
    """Gauges and counters of a server since its start; what the method `server.statistics` answers.

    Only requests that were answered count in `expert_…` and `…_times`. Those are empty where they come from an older
    labkit.

    Args:
        experts: Optimizer steps of each expert, by uid.
        queued_requests: Requests that wait now.
        queued_rows: Rows that wait now.
        batches: Batches in which a request was answered.
        rows: Rows of the requests that were answered.
        busy_seconds: Seconds spent computing.
        overloaded: Requests turned away because too many rows waited.
        expired: Requests whose deadline passed while they waited.
        latency: Mean delay in seconds that is injected into each request.
        loss: Share of requests that are lost on purpose, 0 to 1.
        uptime: Seconds since the server began to compute.
        expert_rows: Rows of each expert's requests, in the order of `experts`.
        expert_requests: Number of each expert's requests, in the order of `experts`.
        expert_seconds: Seconds that those spent in queue and batch, in the order of `experts`.
        total_times: `labkit.histogram` counts of the seconds in queue and batch together.
        queue_times: The same of the seconds in the queue.
        compute_times: The same of the seconds in the batch.
        label: The name that its owner gives the server; empty if there is none.
        relay: `host:port` of the relay through which the server is reached, if it takes no connections itself.
        copies: How it takes part in copies; None if it does not, or if it is an older labkit's.
        processor_seconds: Seconds of a processor's time that its compute threads took, which do not grow while they
            wait for their turn; without what torch's further threads took; 0 from an older labkit.
    """

    experts: Annotated[dict[Uid, Count], PerExpert]
    queued_requests: Count
    queued_rows: Count
    batches: Count
    rows: Count
    busy_seconds: Seconds
    overloaded: Count
    expired: Count
    latency: Seconds
    loss: Annotated[float, msgspec.Meta(ge=0, le=1)]
    uptime: Seconds = 0.0
    expert_rows: Annotated[list[Count], PerExpert] = []
    expert_requests: Annotated[list[Count], PerExpert] = []
    expert_seconds: Annotated[list[Seconds], PerExpert] = []
    total_times: Times = []
    queue_times: Times = []
    compute_times: Times = []
    label: Annotated[str, msgspec.Meta(max_length=4 * MAX_LABEL)] = ""
    relay: Annotated[str, msgspec.Meta(max_length=4 * MAX_LABEL)] = ""
    copies: CopyStatistics | None = None
    processor_seconds: Seconds = 0.0

    def __post_init__(self) -> None:
        self.label, self.relay = clean_label(self.label), clean_label(self.relay)
        for column in (self.expert_rows, self.expert_requests, self.expert_seconds):
            if column and len(column) != len(self.experts):
                raise ValueError(f"{len(column)} numbers for {len(self.experts)} experts")
        for times in (self.total_times, self.queue_times, self.compute_times):
            if times and len(times) != BUCKETS:
                raise ValueError(f"{len(times)} buckets instead of {BUCKETS}")
        if self.copies is not None and len(self.copies.adopted) > len(self.experts):
            raise ValueError(f"{len(self.copies.adopted)} of {len(self.experts)} experts adopted")


def without_experts(statistics: ServerStatistics) -> ServerStatistics:
    """The same statistics without anything about single experts."""
    copies = statistics.copies and msgspec.structs.replace(statistics.copies, adopted=[])
    return msgspec.structs.replace(
        statistics, experts={}, expert_rows=[], expert_requests=[], expert_seconds=[], copies=copies
    )


async def call_statistics(caller: Caller, contact: Contact, timeout: float) -> ServerStatistics:
    """Ask a server how it is doing. Raises a kind of `RPCError`: `BadReply` for numbers that cannot be."""
    reply = await caller.call(contact, STATISTICS, returns=ServerStatistics, timeout=timeout)
    assert isinstance(reply.body, ServerStatistics)
    return reply.body


class RuntimeCounters:
    """What a runtime counts; see `ServerStatistics`. The runtime itself counts `overloaded` and `expired`."""

    def __init__(self, backends: Mapping[str, ExpertBackend]) -> None:
        self.overloaded = self.expired = 0
        self.started_at: float | None = None  # on trio's clock
        self._backends = backends  # which come and go
        self._batches = self._rows = 0
        self._busy_seconds = 0.0
        # Those of experts that have gone stay: if they come back, their counters go on.
        self._expert_rows = defaultdict[str, int](int)
        self._expert_requests = defaultdict[str, int](int)
        self._expert_seconds = defaultdict[str, float](float)
        self._total_times, self._queue_times, self._compute_times = Histogram(), Histogram(), Histogram()

    def count_batch(self, uid: str, answered: Sequence[Task[Any]], started: float, seconds: float) -> int:
        """Count a batch and those of its requests that were `answered`, perhaps none. Returns the rows of these."""
        self._busy_seconds += seconds
        if not answered:
            return 0
        rows = sum(task.rows for task in answered)
        self._batches += 1
        self._rows += rows
        self._expert_rows[uid] += rows
        self._expert_requests[uid] += len(answered)
        for task in answered:
            queued = started - task.arrived
            self._expert_seconds[uid] += queued + seconds
            self._total_times.add(queued + seconds)
            self._queue_times.add(queued)
            self._compute_times.add(seconds)
        return rows

    def statistics(self, queued_requests: int, queued_rows: int, processor_seconds: float) -> ServerStatistics:
        """The counters as they are now, with what waits now. A runtime knows of no injected faults."""
        return ServerStatistics(
            experts={uid: backend.updates for uid, backend in self._backends.items()},
            queued_requests=queued_requests,
            queued_rows=queued_rows,
            batches=self._batches,
            rows=self._rows,
            busy_seconds=self._busy_seconds,
            overloaded=self.overloaded,
            expired=self.expired,
            latency=0.0,
            loss=0.0,
            uptime=0.0 if self.started_at is None else trio.current_time() - self.started_at,
            expert_rows=[self._expert_rows[uid] for uid in self._backends],
            expert_requests=[self._expert_requests[uid] for uid in self._backends],
            expert_seconds=[self._expert_seconds[uid] for uid in self._backends],
            total_times=list(self._total_times.counts),
            queue_times=list(self._queue_times.counts),
            compute_times=list(self._compute_times.counts),
            processor_seconds=processor_seconds,
        )
