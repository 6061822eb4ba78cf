"""Telemetry: events in, counters out. Counters only grow and are bounded; the `sampler` makes rates of them.

No lock is needed, because of who writes what. Events about calls, lost servers and unanswered rows come from the lab
thread alone, and only they change columns and bins. Steps come from trainer threads, metrics, passes and marks from any
thread; all of these go into deques, whose `append` is atomic. Other threads may read everything: columns are flat
arrays that are replaced when they grow, never resized, so a reader sees each number as it was before or after an event,
though not all numbers of the same instant.
"""

# N: experts, S: servers

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from labkit.errors import CAUSES
from labkit.events import (
    CallFailed,
    CallFinished,
    Event,
    ExpertGivenUp,
    ExpertHandedOver,
    ExpertTakenOver,
    MetricsLogged,
    PassFinished,
    RowsUnanswered,
    ServerLost,
    StepFinished,
)
from labkit.histogram import BUCKETS, bucket
from labkit.view.collect import time_series as series
from labkit.view.collect.moves import Move
from labkit.view.collect.time_series import Bins
from labkit.view.scene import SPLIT, Doubles, Mark

MAX_COUNTED_EXPERTS = 20_000  # the calls to further experts are counted in the totals only
MAX_COUNTED_SERVERS = 1_000  # likewise
MAX_MARKS = 200
MAX_WAITING_MOVES = 10_000  # experts that have changed their server, waiting for the sampler
MAX_WAITING_METRICS = 10_000  # events waiting for the sampler
MAX_PASSES = 256  # the last ones of a layer and direction
MAX_PASS_KINDS = 64  # layers × directions
MAX_WAITING_STEPS = 100_000  # waiting for the sampler; as many as a run keeps in its `history`, of the same objects

# Columns of an expert. SERVER: number of the server that was last called for it.
CALLS, FAILED, ROWS, SECONDS, STALENESS_SUM, STALENESS_COUNT, UPDATES, SERVER = range(8)
EXPERT_COLUMNS = 8
# Columns of a server: these, one for each of CAUSES, and histograms of latency, len(SPLIT) × BUCKETS.
SERVER_SECONDS, LAST_ANSWER, CAUSE = range(3)
TIMES = CAUSE + len(CAUSES)
SERVER_COLUMNS = TIMES + len(SPLIT) * BUCKETS

_CAUSE = {cause: number for number, cause in enumerate(CAUSES)}
_OTHER = _CAUSE["failed"]


@dataclass(slots=True)
class Calls:
    """Calls to one server or one expert, as counted until now."""

    finished: int = 0
    seconds: float = 0.0  # of all finished calls together
    updates: int = 0
    last_answer: float | None = None  # monotonic; None before the first answer
    failed: Counter[str] = field(default_factory=Counter)  # cause -> calls

    @property
    def mean_seconds(self) -> float:
        """Mean time of an answered call."""
        return self.seconds / self.finished if self.finished else 0.0


class CounterTable:
    """Rows of numbers by name, in one flat array. Names beyond the first `max_names` share row 0, which is not read."""

    def __init__(self, columns: int, max_names: int) -> None:
        self.columns = columns
        self.names: list[str] = []  # names[n] has row n + 1
        self.rows: dict[str, int] = {}
        self.cells = array("d", bytes(8 * 64 * columns))
        self._max_names = max_names

    def add(self, name: str) -> int:
        """Add a new name and return its row."""
        if len(self.names) >= self._max_names:
            return 0
        row = len(self.names) + 1
        if len(self.cells) <= row * self.columns:
            self.cells = self.cells + array("d", bytes(8 * len(self.cells)))
        self.names.append(name)  # after the array has grown: a thread that reads a name finds its row
        self.rows[name] = row
        return row

    def read(self) -> Doubles:
        """Returns a copy, [number of names, columns]."""
        count = len(self.names)
        return np.frombuffer(self.cells)[self.columns : (count + 1) * self.columns].reshape(count, self.columns).copy()


class Telemetry:
    """Counts of calls, and of failures by cause: in all, by time, by server address and by expert uid."""

    def __init__(self, started: float | None = None) -> None:
        self.started = time.monotonic() if started is None else started
        self.servers_lost = 0
        self.unanswered_rows = 0  # in forward passes
        self.experts = CounterTable(EXPERT_COLUMNS, MAX_COUNTED_EXPERTS)
        self.servers = CounterTable(SERVER_COLUMNS, MAX_COUNTED_SERVERS)
        self.bins = Bins(series.CALL_COLUMNS, self.started)
        self.steps: deque[StepFinished] = deque(maxlen=MAX_WAITING_STEPS)
        self.taken_over = self.updates_lost = 0  # experts, and their updates
        self.moves: deque[Move] = deque(maxlen=MAX_WAITING_MOVES)
        self.lost: deque[ServerLost] = deque(maxlen=MAX_MARKS)
        self.marks: deque[Mark] = deque(maxlen=MAX_MARKS)
        self.metrics: deque[MetricsLogged] = deque(maxlen=MAX_WAITING_METRICS)
        self.passes: dict[tuple[str, str], deque[PassFinished]] = {}  # by layer and direction
        self.logged_step: tuple[int, float, float] | None = None  # by `Swarm.log`: step, loss, monotonic time
        self._causes: dict[str, Counter[str]] = {}  # of experts that have failed
        self._take: dict[type[Event], Callable[..., None]] = {
            CallFinished: self._finished,
            CallFailed: self._failed,
            StepFinished: self.steps.append,
            ServerLost: self._lost,
            RowsUnanswered: self._unanswered,
            PassFinished: self._passed,
            MetricsLogged: self.metrics.append,
            ExpertTakenOver: self._moved,
            ExpertHandedOver: self._moved,
            ExpertGivenUp: self._moved,
        }

    def __call__(self, event: Event) -> None:
        """Count an event. A telemetry is itself an `Emit`."""
        take = self._take.get(event.__class__)
        if take is not None:
            take(event)

    def mark(self, text: str, at: float | None = None) -> None:
        """Note on the timeline what happened to a server, at a monotonic time or now. May be called in any thread."""
        at = time.monotonic() if at is None else at
        self.marks.append(Mark(at - self.started, text[:200]))

    # ------------------------------------------------------------ what others read

    @property
    def total(self) -> Calls:
        """All calls together."""
        total = self.bins.total()
        failed = {cause: int(count) for cause, count in zip(CAUSES, total[series.FAILED :], strict=True) if count}
        return Calls(int(total[series.CALLS]), float(total[series.SECONDS]), failed=Counter(failed))

    @property
    def by_address(self) -> Mapping[str, Calls]:
        """Calls to each server."""
        return _View(self.servers, self._server_calls)

    @property
    def by_uid(self) -> Mapping[str, Calls]:
        """Calls to each expert."""
        return _View(self.experts, self._expert_calls)

    def _server_calls(self, address: str, cells: array[float], at: int) -> Calls:
        failed = {cause: int(cells[at + CAUSE + number]) for cause, number in _CAUSE.items()}
        return Calls(
            int(sum(cells[at + TIMES : at + TIMES + BUCKETS])), cells[at + SERVER_SECONDS],
            last_answer=cells[at + LAST_ANSWER] or None,
            failed=Counter({cause: count for cause, count in failed.items() if count}),
        )  # fmt: skip

    def _expert_calls(self, uid: str, cells: array[float], at: int) -> Calls:
        failed = self._causes.get(uid, Counter())
        return Calls(int(cells[at + CALLS]), cells[at + SECONDS], int(cells[at + UPDATES]), failed=Counter(failed))

    # ------------------------------------------------------------ events of the lab thread

    def _finished(self, event: CallFinished) -> None:
        # Some 20 additions, each in place: this runs once per call, in the thread that makes the calls.
        seconds, rows, staleness, experts, servers = (
            event.seconds, event.rows, event.staleness, self.experts, self.servers,
        )  # fmt: skip
        server = servers.rows.get(event.address)
        if server is None:
            server = servers.add(event.address)
        expert = experts.rows.get(event.uid)
        if expert is None:
            expert = experts.add(event.uid)

        cells, at = experts.cells, expert * EXPERT_COLUMNS
        cells[at] += 1.0  # CALLS
        cells[at + ROWS] += rows
        cells[at + SECONDS] += seconds
        if event.updates > cells[at + UPDATES]:
            cells[at + UPDATES] = event.updates
        cells[at + SERVER] = server

        queue, compute = event.queue, event.compute
        others, place = servers.cells, server * SERVER_COLUMNS
        others[place] += seconds  # SERVER_SECONDS
        others[place + 1] = event.at  # LAST_ANSWER
        place += TIMES  # the histograms of SPLIT, one after the other
        others[place + bucket(seconds)] += 1.0
        others[place + BUCKETS + bucket(queue)] += 1.0
        others[place + 2 * BUCKETS + bucket(compute)] += 1.0
        others[place + 3 * BUCKETS + bucket(seconds - queue - compute)] += 1.0  # network; a server may exaggerate

        bins = self.bins
        if event.at >= bins.until:
            bins.advance(event.at)
        sums = bins.current
        sums[0] += 1.0  # CALLS
        sums[1] += rows
        sums[2] += seconds
        sums[3] += event.bytes
        if staleness is not None:
            cells[at + STALENESS_SUM] += staleness
            cells[at + STALENESS_COUNT] += 1.0
            sums[4] += staleness
            sums[5] += 1.0

    def _failed(self, event: CallFailed) -> None:
        cause = _CAUSE.get(event.cause, _OTHER)
        server = self.servers.rows.get(event.address) or self.servers.add(event.address)
        self.servers.cells[server * SERVER_COLUMNS + CAUSE + cause] += 1.0
        expert = self.experts.rows.get(event.uid) or self.experts.add(event.uid)
        self.experts.cells[expert * EXPERT_COLUMNS + FAILED] += 1.0
        self.experts.cells[expert * EXPERT_COLUMNS + SERVER] = server
        if expert:
            self._causes.setdefault(event.uid, Counter())[event.cause] += 1
        if event.at >= self.bins.until:
            self.bins.advance(event.at)
        self.bins.current[series.FAILED + cause] += 1.0

    def _lost(self, event: ServerLost) -> None:
        self.servers_lost += 1
        self.lost.append(event)

    def _moved(self, event: Move) -> None:
        self.moves.append(event)
        if isinstance(event, ExpertTakenOver):
            self.taken_over += 1
        if not isinstance(event, ExpertHandedOver):
            self.updates_lost += event.lost_updates

    def _unanswered(self, event: RowsUnanswered) -> None:
        if event.direction == "forward":
            self.unanswered_rows += event.rows

    def _passed(self, event: PassFinished) -> None:
        kind = event.prefix, event.direction
        passes = self.passes.get(kind)
        if passes is None:
            if len(self.passes) >= MAX_PASS_KINDS:
                return
            passes = self.passes.setdefault(kind, deque(maxlen=MAX_PASSES))
        passes.append(event)


class _View(Mapping[str, Calls]):
    """The rows of a table as `Calls`, made on access."""

    def __init__(self, table: CounterTable, make: Callable[[str, array[float], int], Calls]) -> None:
        self._table = table
        self._make = make

    def __getitem__(self, name: str) -> Calls:
        row = self._table.rows[name]
        return self._make(name, self._table.cells, row * self._table.columns)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._table.names))

    def __len__(self) -> int:
        return len(self._table.names)
