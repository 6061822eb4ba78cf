"""What a server says of itself: gauges and counters. They come from a stranger, so all of them are bounded."""

from __future__ import annotations

from typing import Annotated

import msgspec

from labkit.contact import Contact
from labkit.faults import Faults
from labkit.histogram import BUCKETS
from labkit.server.tally import RuntimeStatistics
from labkit.wire.methods import Caller

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
