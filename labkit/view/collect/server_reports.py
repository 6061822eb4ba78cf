"""What servers say of themselves: their statistics as counters that only grow, in the rows of the registry.

For the `sampler`: all that a process knows that makes no calls itself, and always the queues and optimizer steps. A
server that begins anew counts from 0 again; here the sums go on.
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
from labkit.view.collect.rates import NEGLIGIBLE, RecentSums, Values, longer
from labkit.view.collect.registry import Registry
from labkit.view.scene import Ints

RATE_TAU = 2.5  # seconds
TIMES_TAU = 5.0  # seconds
OVERDUE = 2.5  # seconds without a report, after which rates fall
ROWS, REQUESTS, SECONDS = range(3)

News = list[tuple[int, ServerStatistics, float]]  # rows of servers, what they said, and seconds since the last time


class ServerReports:
    """Columns of what was reported; NaN where a server never said."""

    def __init__(self) -> None:
        self.heard_at: Values = np.zeros(0)  # [S], monotonic
        self.queue: Values = np.zeros(0)  # [S], requests
        self.injected: Values = np.zeros((0, 2))  # [S, 2]
        self.updates: Values = np.zeros(0)  # [N]
        self.counts: Values = np.zeros((0, 3))  # [N, 3]: ROWS, REQUESTS, SECONDS, as the servers have them
        self.rates: Values = np.zeros((0, 3))  # [N, 3], per second
        self.last_ones: Values = np.zeros((0, 3))  # [N, 3], sums of the last ones
        self.times: Values = np.zeros((0, 3 * BUCKETS))  # [S, 3 × BUCKETS]: total, queue, compute, of the last ones
        self._grown: Values = np.zeros((0, 3))  # [N, 3], since they were first heard of
        self._time_counts: Values = np.zeros((0, 3 * BUCKETS))
        self._times_grown: Values = np.zeros((0, 3 * BUCKETS))
        self._spacing: Values = np.zeros(0)  # [S], seconds between a server's last two reports
        self._rated: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)  # [N], whether there is a rate
        self._taken_at = -math.inf
        self._last_expert = RecentSums(3, TIMES_TAU)
        self._last_times = RecentSums(3 * BUCKETS, TIMES_TAU)
        self._rows: dict[int, tuple[list[str], Ints]] = {}  # of the experts of a server
        self._statistics: Mapping[str, tuple[ServerStatistics, float]] = {}

    def take(self, inventory: Inventory, registry: Registry, now: float, *, counters: bool) -> None:
        """Learn from an inventory. Without `counters`, only gauges and updates, which is cheap."""
        self._grow(len(registry.labels), len(registry.uids))
        news = self._news(inventory, registry)
        rows = self._rows_at(news, registry)
        if news:
            values = _flat(statistics.experts.values() for _, statistics, _ in news)
            self.updates[rows[rows >= 0]] = values[rows >= 0]
        if counters and (news or now - self._taken_at > OVERDUE):
            self._fade(registry, now)
            self._count_experts(rows, news)
            self._count_times(news)
            self._taken_at = now
            self.last_ones = self._last_expert.take(self._grown.copy(), self._grown[:, REQUESTS].copy(), now)
            self.times = self._last_times.take(self._times_grown.copy(), self._times_grown.sum(axis=1), now)

    def _news(self, inventory: Inventory, registry: Registry) -> News:
        """What servers have said since the last inventory, by row; and its gauges."""
        news: News = []
        if inventory.statistics is self._statistics:
            return news
        before, self._statistics = self._statistics, inventory.statistics
        for address, (statistics, at) in inventory.statistics.items():
            row = registry.known_address(address)
            if row < 0 or (address in before and before[address][1] == at):
                continue
            passed = at - before[address][1] if address in before else 0.0
            news.append((row, statistics, passed))
            self._spacing[row] = passed
            self.heard_at[row] = at
            self.queue[row] = statistics.queued_requests
            self.injected[row] = statistics.latency, statistics.loss
        return news

    def _rows_at(self, news: News, registry: Registry) -> Ints:
        """The rows of all experts in the news; -1 for one that its server does not hold, as far as is known here."""
        rows: list[Ints] = []
        for server, statistics, _ in news:
            uids = list(statistics.experts)
            known = self._rows.get(server)
            if known is None or known[0] != uids:
                known = uids, np.array([registry.known_expert(uid) for uid in uids], dtype=np.int64)
                if (known[1] >= 0).all():  # else one may be known the next time
                    self._rows[server] = known
            rows.append(known[1])
        if not rows or not len(registry.server):
            return np.full(sum(map(len, rows)), -1)
        at = np.concatenate(rows)
        servers = np.repeat([server for server, _, _ in news], [len(theirs) for theirs in rows])
        return np.where((at >= 0) & (registry.server[at] == servers), at, -1)

    def _count_experts(self, at: Ints, news: News) -> None:
        told = [_tells(statistics) for _, statistics, _ in news]
        if not any(told):
            return
        sizes = [len(statistics.experts) for _, statistics, _ in news]
        passed = np.repeat([seconds for _, _, seconds in news], sizes)[np.repeat(told, sizes)]
        at = at[np.repeat(told, sizes)]
        columns = [
            _flat(getattr(statistics, name) for told_it, (_, statistics, _) in zip(told, news, strict=True) if told_it)
            for name in ("expert_rows", "expert_requests", "expert_seconds")
        ]
        values, shown = np.stack(columns, axis=1), at >= 0  # [n, 3]
        at, values, passed = at[shown], values[shown], passed[shown]
        growth = _growth(self.counts[at], values)
        self._grown[at] += growth
        self.counts[at] = values
        timed = passed > 0  # a server that was heard of before
        self._rate(at[timed], growth[timed], passed[timed, None])

    def _rate(self, at: Ints, growth: Values, passed: Values) -> None:
        """Rates since the last report [n, 3], into the running means; the first is taken as it is."""
        weight = np.where(self._rated[at, None], 1 - np.exp(-passed / RATE_TAU), 1.0)
        self.rates[at] += weight * (growth / passed - self.rates[at])
        self._rated[at] = True

    def _fade(self, registry: Registry, now: float) -> None:
        """Rates fall where a server is overdue: it has not reported for much longer than between its last reports."""
        overdue = now - self.heard_at > np.maximum(OVERDUE, 2 * self._spacing)
        rows = np.append(overdue, False)[registry.server]
        self.rates[: len(rows)][rows] *= math.exp(-(now - self._taken_at) / RATE_TAU)
        self.rates[self.rates < NEGLIGIBLE] = 0.0

    def _count_times(self, news: News) -> None:
        told = [(row, s) for row, s, _ in news if s.total_times and s.queue_times and s.compute_times]
        if not told:
            return
        at = np.array([row for row, _ in told])
        lists = chain.from_iterable((s.total_times, s.queue_times, s.compute_times) for _, s in told)
        values = _flat(lists).reshape(len(told), 3 * BUCKETS)
        self._times_grown[at] += _growth(self._time_counts[at], values)
        self._time_counts[at] = values

    def _grow(self, servers: int, experts: int) -> None:
        for name in ("heard_at", "queue", "injected", "_time_counts"):
            setattr(self, name, longer(getattr(self, name), servers, np.nan))
        for name in ("times", "_times_grown", "_spacing"):
            setattr(self, name, longer(getattr(self, name), servers))
        for name in ("updates", "counts"):
            setattr(self, name, longer(getattr(self, name), experts, np.nan))
        for name in ("rates", "last_ones", "_grown", "_rated"):
            setattr(self, name, longer(getattr(self, name), experts))


def _growth(before: Values, after: Values) -> Values:
    """What was added, [n, K]: nothing at first, and all of it where a server began anew."""
    growth = after - before
    anew = (growth < 0).any(axis=1)
    growth[anew] = after[anew]
    growth[np.isnan(before).any(axis=1)] = 0
    return growth


def _tells(statistics: ServerStatistics) -> bool:
    return bool(statistics.expert_rows and statistics.expert_requests and statistics.expert_seconds)


def _flat(lists: Iterable[Iterable[float]]) -> Values:
    return np.array(list(chain.from_iterable(lists)), dtype=np.float64)
