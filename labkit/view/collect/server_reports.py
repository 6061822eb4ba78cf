"""What servers report about themselves: their statistics as counters that only grow, in the rows of the registry.

The `sampler` always takes queues and optimizer steps from here, and everything else in a process that makes no calls
itself. A server that restarts counts from 0 again; the sums here go on.
"""

# N: experts, S: servers

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np
import numpy.typing as npt

from labkit.histogram import BUCKETS
from labkit.server.statistics import ServerStatistics
from labkit.view.collect.inventory import Inventory
from labkit.view.collect.rates import NEGLIGIBLE_COUNT, RecentSums, pad_rows
from labkit.view.collect.registry import Registry
from labkit.view.scene import Bools, Doubles, Ints

RATE_TAU = 2.5  # seconds, time constant of the rates' decay
TIMES_TAU = 5.0  # seconds, time constant of the decay of latencies and staleness
OVERDUE_AFTER = 2.5  # seconds without a report after which a server's rates decay
ROWS, REQUESTS, SECONDS = range(3)

Reports = list[tuple[int, ServerStatistics, float]]  # a server's row, its report, and the seconds since the one before


class ServerReports:
    """Columns of what was reported; NaN where a server has never reported."""

    def __init__(self) -> None:
        self.heard_at: Doubles = np.zeros(0)  # [S], monotonic
        self.queue: Doubles = np.zeros(0)  # [S], requests
        self.injected: Doubles = np.zeros((0, 2))  # [S, 2]
        self.updates: Doubles = np.zeros(0)  # [N]
        self.adopted: Bools = np.zeros(0, dtype=np.bool_)  # [N]
        self.copies: Doubles = np.zeros((0, 2))  # [S, 2]: kept, adopted
        self.counts: Doubles = np.zeros((0, 3))  # [N, 3]: ROWS, REQUESTS, SECONDS, as last reported
        self.rates: Doubles = np.zeros((0, 3))  # [N, 3], per second
        self.recent: Doubles = np.zeros((0, 3))  # [N, 3], decaying sums
        self.times: Doubles = np.zeros((0, 3 * BUCKETS))  # [S, 3 × BUCKETS], the same: total, queue, compute
        self._grown: Doubles = np.zeros((0, 3))  # [N, 3], since the first report
        self._time_counts: Doubles = np.zeros((0, 3 * BUCKETS))
        self._times_grown: Doubles = np.zeros((0, 3 * BUCKETS))
        self._spacing: Doubles = np.zeros(0)  # [S], seconds between a server's last two reports
        self._rated: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)  # [N], whether there is a rate
        self._taken_at = -math.inf
        self._recent_expert = RecentSums(3, TIMES_TAU)
        self._recent_times = RecentSums(3 * BUCKETS, TIMES_TAU)
        self._rows: dict[int, tuple[list[str], Ints]] = {}  # server -> uids and rows of its experts
        self._statistics: Mapping[str, tuple[ServerStatistics, float]] = {}

    def take(self, inventory: Inventory, registry: Registry, now: float, *, counters: bool) -> None:
        """Learn from an inventory. Without `counters`, take only gauges and updates, which is cheap."""
        self._grow(len(registry.labels), len(registry.uids))
        reports = self._new_reports(inventory, registry)
        rows = self._rows_at(reports, registry)
        if reports:
            values = _flat(statistics.experts.values() for _, statistics, _ in reports)
            self.updates[rows[rows >= 0]] = values[rows >= 0]
            self.adopted[rows[rows >= 0]] = _adopted(reports)[rows >= 0]
        if counters and (reports or now - self._taken_at > OVERDUE_AFTER):
            self._fade(registry, now)
            self._count_experts(rows, reports)
            self._count_times(reports)
            self._taken_at = now
            self.recent = self._recent_expert.take(self._grown.copy(), self._grown[:, REQUESTS].copy(), now)
            self.times = self._recent_times.take(self._times_grown.copy(), self._times_grown.sum(axis=1), now)

    def _new_reports(self, inventory: Inventory, registry: Registry) -> Reports:
        """Returns the reports since the last inventory, and stores their gauges."""
        reports: Reports = []
        if inventory.statistics is self._statistics:
            return reports
        before, self._statistics = self._statistics, inventory.statistics
        for address, (statistics, at) in inventory.statistics.items():
            row = registry.known_address(address)
            if row < 0 or (address in before and before[address][1] == at):
                continue
            passed = at - before[address][1] if address in before else 0.0
            reports.append((row, statistics, passed))
            self._spacing[row] = passed
            self.heard_at[row] = at
            self.queue[row] = statistics.queued_requests
            self.injected[row] = statistics.latency, statistics.loss
            said = statistics.copies
            self.copies[row] = (math.nan, math.nan) if said is None else (said.kept, len(said.adopted))
        return reports

    def _rows_at(self, reports: Reports, registry: Registry) -> Ints:
        """Returns the rows of all reported experts; -1 for an expert that is not known to be held by that server."""
        rows: list[Ints] = []
        for server, statistics, _ in reports:
            uids = list(statistics.experts)
            known = self._rows.get(server)
            if known is None or known[0] != uids:
                known = uids, np.array([registry.known_expert(uid) for uid in uids], dtype=np.int64)
                if (known[1] >= 0).all():  # otherwise more of them may be known next time
                    self._rows[server] = known
            rows.append(known[1])
        if not rows or not len(registry.server):
            return np.full(sum(map(len, rows)), -1)
        at = np.concatenate(rows)
        servers = np.repeat([server for server, _, _ in reports], [len(theirs) for theirs in rows])
        return np.where((at >= 0) & (registry.server[at] == servers), at, -1)

    def _count_experts(self, at: Ints, reports: Reports) -> None:
        complete = [_counts_experts(statistics) for _, statistics, _ in reports]
        if not any(complete):
            return
        sizes = [len(statistics.experts) for _, statistics, _ in reports]
        passed = np.repeat([seconds for _, _, seconds in reports], sizes)[np.repeat(complete, sizes)]
        at = at[np.repeat(complete, sizes)]
        columns = [
            _flat(getattr(statistics, name) for ok, (_, statistics, _) in zip(complete, reports, strict=True) if ok)
            for name in ("expert_rows", "expert_requests", "expert_seconds")
        ]
        values, shown = np.stack(columns, axis=1), at >= 0  # [n, 3]
        at, values, passed = at[shown], values[shown], passed[shown]
        growth = _growth(self.counts[at], values)
        self._grown[at] += growth
        self.counts[at] = values
        timed = passed > 0  # the server has reported before
        self._rate(at[timed], growth[timed], passed[timed, None])

    def _rate(self, at: Ints, growth: Doubles, passed: Doubles) -> None:
        """Add the rates since the last report [n, 3] to the running means, which begin with the first one."""
        weight = np.where(self._rated[at, None], 1 - np.exp(-passed / RATE_TAU), 1.0)
        self.rates[at] += weight * (growth / passed - self.rates[at])
        self._rated[at] = True

    def _fade(self, registry: Registry, now: float) -> None:
        """Let the rates decay of servers that are overdue: silent for much longer than between their last reports."""
        overdue = now - self.heard_at > np.maximum(OVERDUE_AFTER, 2 * self._spacing)
        rows = np.append(overdue, False)[registry.server]
        self.rates[: len(rows)][rows] *= math.exp(-(now - self._taken_at) / RATE_TAU)
        self.rates[self.rates < NEGLIGIBLE_COUNT] = 0.0

    def _count_times(self, reports: Reports) -> None:
        timed = [(row, s) for row, s, _ in reports if s.total_times and s.queue_times and s.compute_times]
        if not timed:
            return
        at = np.array([row for row, _ in timed])
        lists = chain.from_iterable((s.total_times, s.queue_times, s.compute_times) for _, s in timed)
        values = _flat(lists).reshape(len(timed), 3 * BUCKETS)
        self._times_grown[at] += _growth(self._time_counts[at], values)
        self._time_counts[at] = values

    def _grow(self, servers: int, experts: int) -> None:
        for name in ("heard_at", "queue", "injected", "copies", "_time_counts"):
            setattr(self, name, pad_rows(getattr(self, name), servers, np.nan))
        for name in ("times", "_times_grown", "_spacing"):
            setattr(self, name, pad_rows(getattr(self, name), servers))
        for name in ("updates", "counts"):
            setattr(self, name, pad_rows(getattr(self, name), experts, np.nan))
        for name in ("rates", "recent", "_grown", "_rated", "adopted"):
            setattr(self, name, pad_rows(getattr(self, name), experts))


def _growth(before: Doubles, after: Doubles) -> Doubles:
    """Returns what was added, [n, K]: nothing at a first report, and everything after a server's restart."""
    growth = after - before
    restarted = (growth < 0).any(axis=1)
    growth[restarted] = after[restarted]
    growth[np.isnan(before).any(axis=1)] = 0
    return growth


def _counts_experts(statistics: ServerStatistics) -> bool:
    return bool(statistics.expert_rows and statistics.expert_requests and statistics.expert_seconds)


def _adopted(reports: Reports) -> Bools:
    """Returns for each expert that is reported whether its server adopted it."""
    flags: list[Bools] = []
    for _, statistics, _ in reports:
        count, adopted = len(statistics.experts), set(() if statistics.copies is None else statistics.copies.adopted)
        theirs = (uid in adopted for uid in statistics.experts)
        flags.append(np.fromiter(theirs, np.bool_, count) if adopted else np.zeros(count, dtype=np.bool_))
    return np.concatenate(flags)


def _flat(lists: Iterable[Iterable[float]]) -> Doubles:
    return np.array(list(chain.from_iterable(lists)), dtype=np.float64)
