"""What is logged, as plain rows: of the swarm (made from a scene) and of training steps (made from events).

`swarm_logging` hands these rows to one of `loggers`. A row has no key per expert or server: however large
the swarm, it has the same few dozen columns.
"""

# S: servers

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from labkit.errors import CAUSES
from labkit.events import ExpertNews, MetricsLogged, StepFinished
from labkit.view.picture.canvas import Picture
from labkit.view.scene import PERCENTILES, SPLIT, Doubles, Experts, Floats, Scene, Servers, State

HISTOGRAM_BINS = 32
MAX_TABLE_ROWS = 1_000  # servers in a table
MAX_MIXED_SERVERS = 100  # the busiest servers, from which percentiles over all servers are made
MAX_STEP_ROWS = 500  # rows of steps waiting to be logged
MAX_METRIC_ROWS = 1_000  # events with metrics waiting to be logged
MAX_EVENT_ROWS = 1_000  # other events waiting to be logged
RATE_STEPS = 20  # rows of steps over which samples/s are computed


@dataclass(frozen=True, slots=True)
class LoggedHistogram:
    """A histogram: `counts[i]` values lie between `bins[i]` and `bins[i + 1]`."""

    bins: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoggedTable:
    """A table: rows of texts and numbers; None where a number is not known."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


LoggedValue = float | str | LoggedHistogram | LoggedTable | Picture
LoggedRow = dict[str, LoggedValue]


# ---------------------------------------------------------------- of the swarm


def swarm_row(scene: Scene) -> LoggedRow:
    """Make a row of a scene's numbers, `swarm/…`, and the histogram of the experts' load, without what is not known.

    Rates are per second, over the last seconds, and latencies in ms; `failures/…`, `answered`, `unanswered_rows`,
    `experts_taken_over` and `updates_lost` count from the start. `experts_at_risk` and `experts_adopted` are there
    where servers make copies. `routing_entropy` is 1 if all experts get the same load and 0 if one expert gets all of
    it.
    """
    head = scene.headline
    row: dict[str, float] = {
        "swarm/seconds": scene.at,
        "swarm/experts": head.experts,
        "swarm/experts_alive": head.experts_alive,
        "swarm/experts_dead": int((scene.experts.state == State.DEAD).sum()),
        "swarm/servers": head.servers,
        "swarm/servers_alive": head.servers_alive,
        "swarm/calls_per_s": head.calls,
        "swarm/bytes_per_s": head.bytes,
        "swarm/in_flight": head.in_flight,
        "swarm/staleness": head.staleness,
        "swarm/answered": head.answered,
        "swarm/unanswered_rows": head.unanswered_rows,
        "swarm/routing_entropy": routing_entropy(scene.experts),
        "swarm/experts_at_risk": head.at_risk,
        "swarm/experts_adopted": int(scene.experts.adopted.sum()) if scene.copies is not None else math.nan,
        "swarm/experts_taken_over": head.taken_over,
        "swarm/updates_lost": head.updates_lost,
    }
    for direction in ("forward", "backward"):
        passes = [one for one in scene.waits if one.direction == direction]  # a mean over the layers
        for name in ("seconds", "waited", "patience") if passes else ():
            row[f"swarm/pass/{direction}_{name}"] = sum(getattr(one, name) for one in passes) / len(passes)
    if scene.source == "calls":  # a process that makes no calls knows of no failures
        row |= {f"swarm/failures/{cause}": head.failed.get(cause, 0) for cause in CAUSES}
    for part, values in zip(SPLIT, overall_latency(scene.servers), strict=True):
        place = "swarm/latency_ms" if part == "total" else f"swarm/latency_ms/{part}"
        row |= {f"{place}/p{q}": float(value) for q, value in zip(PERCENTILES, values, strict=True)}
    known: LoggedRow = {key: value for key, value in row.items() if math.isfinite(value)}
    histogram = load_histogram(scene.experts)
    return known if histogram is None else known | {"swarm/load": histogram}


def routing_entropy(experts: Experts) -> float:
    """Returns the entropy of the load over a layer's live experts, as a share of its maximum: 0 to 1.

    This is the mean over layers, and NaN if no layer has both load and two experts.
    """
    found = []
    load = np.nan_to_num(experts.load.astype(np.float64))
    offered = (experts.state == State.ALIVE) | (load > 0)
    for layer in np.unique(experts.layer[offered]):
        of_layer = load[offered & (experts.layer == layer)]
        if len(of_layer) > 1 and of_layer.sum() > 0:
            share = of_layer[of_layer > 0] / of_layer.sum()
            found.append(float(-(share * np.log(share)).sum() / math.log(len(of_layer))))
    return abs(sum(found) / len(found)) if found else math.nan  # abs turns -0.0 into 0.0


def load_histogram(experts: Experts) -> LoggedHistogram | None:
    """Returns how many experts get how many rows/s; None if no expert's load is known."""
    load = experts.load[np.isfinite(experts.load)].astype(np.float64)
    if not len(load):
        return None
    counts, bins = np.histogram(load, HISTOGRAM_BINS, range=(0.0, max(float(load.max()), 1e-3)))
    return LoggedHistogram(tuple(bins.tolist()), tuple(counts.tolist()))


def overall_latency(servers: Servers) -> Doubles:
    """Returns the latency over all servers in ms, [SPLIT, PERCENTILES]; NaN if no server was called recently.

    A server's calls are assumed to lie evenly between its percentiles, and servers are weighted by their calls/s.
    """
    overall = np.full((len(SPLIT), len(PERCENTILES)), np.nan)
    weight = np.nan_to_num(servers.calls.astype(np.float64))
    busiest = np.argsort(-weight, kind="stable")[:MAX_MIXED_SERVERS]
    for part in range(len(SPLIT)):
        known = busiest[(weight[busiest] > 0) & np.isfinite(servers.latency[busiest, part]).all(axis=1)]
        if len(known):
            overall[part] = _mix(servers.latency[known, part], weight[known])
    return overall


def _mix(percentiles: Floats, weight: Doubles) -> Doubles:
    """Returns the percentiles [3] of a mixture of distributions with the percentiles [S, 3] and the weights [S]."""
    wanted = np.array(PERCENTILES) / 100
    values = np.unique(percentiles).astype(np.float64)
    below = np.zeros(len(values))  # share of calls that took at most that long
    for known, share in zip(percentiles.astype(np.float64), weight / weight.sum(), strict=True):
        below += share * np.interp(values, [0.0, *known], [0.0, *wanted], right=1.0)
    return np.interp(wanted, below, values)


def server_table(scene: Scene) -> LoggedTable:
    """Make a table with a row for each server, worst first."""
    servers = scene.servers
    columns = (
        "server", "address", "state", "heard s ago", "experts", "alive", "copies", "adopted", "calls/s", "queue",
        *(f"{part} p{q} ms" for part in SPLIT for q in PERCENTILES), *CAUSES,
    )  # fmt: skip
    rows = []
    for i in servers.worst_first()[:MAX_TABLE_ROWS]:
        numbers = [
            servers.heard[i], servers.experts[i], servers.alive[i], servers.copies[i], servers.adopted[i],
            servers.calls[i], servers.queue[i],
            *servers.latency[i].reshape(-1), *servers.failed[i],
        ]  # fmt: skip
        rows.append((servers.labels[i], servers.addresses[i], servers.words[i], *map(_known, numbers)))
    return LoggedTable(columns, tuple(rows))


def _known(number: float) -> float | None:
    """Returns a Python number, or None for NaN and infinity."""
    value = float(number)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else round(value, 4)


# ---------------------------------------------------------------- of training steps


@dataclass(frozen=True, slots=True)
class StepMeans:
    """A training step, or the means of several consecutive ones."""

    first: int  # number of the first step
    last: int
    count: int
    at: float  # monotonic seconds, end of the last step
    samples: int  # of all steps together
    loss: float
    staleness: float
    seconds: float  # duration of a step

    @classmethod
    def of(cls, event: StepFinished) -> StepMeans:
        return cls(event.step, event.step, 1, event.at, event.samples, event.loss, event.staleness, event.seconds)

    def merge(self, later: StepMeans) -> StepMeans:
        """Merge these steps and the ones that follow."""
        count = self.count + later.count

        def mean(mine: float, theirs: float) -> float:
            return (mine * self.count + theirs * later.count) / count

        return StepMeans(
            self.first, later.last, count, later.at, self.samples + later.samples, mean(self.loss, later.loss),
            mean(self.staleness, later.staleness), mean(self.seconds, later.seconds),
        )  # fmt: skip


class StepQueue:
    """Steps waiting to be logged, at most `limit` rows. When there are more, pairs of the older half are merged.

    Trainers add steps and the view's thread takes them. Both are quick, so trainers never wait for a logger.
    """

    def __init__(self, limit: int = MAX_STEP_ROWS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: list[StepMeans] = []
        self._recent: deque[StepMeans] = deque(maxlen=RATE_STEPS + 1)  # the last rows taken

    def add(self, event: StepFinished) -> None:
        """Add a finished step."""
        steps = StepMeans.of(event)
        with self._lock:
            self._waiting.append(steps)
            if len(self._waiting) > self._limit:
                self._merge()

    def _merge(self) -> None:
        half = len(self._waiting) // 2
        older = self._waiting[: half - half % 2]
        self._waiting[: len(older)] = [a.merge(b) for a, b in zip(older[::2], older[1::2], strict=True)]

    def take(self) -> Iterator[dict[str, float]]:
        """Take all waiting steps as rows `train/…`, the oldest first, without numbers that are not finite.

        If a row stands for several steps, `train/merged_steps` says for how many.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for steps in waiting:
            row: dict[str, float] = {
                "train/step": steps.last,
                "train/loss": steps.loss,
                "train/samples_per_s": self._rate(steps),
                "train/staleness": steps.staleness,
                "train/step_seconds": steps.seconds,
            }
            if steps.count > 1:
                row["train/merged_steps"] = steps.count
            yield {key: value for key, value in row.items() if math.isfinite(value)}

    def _rate(self, steps: StepMeans) -> float:
        """Samples per second over the last rows; NaN at the first row of a run."""
        if steps.first == 1:
            self._recent.clear()  # another run
        self._recent.append(steps)
        seconds = steps.at - self._recent[0].at
        samples = sum(later.samples for _, later in pairwise(self._recent))
        return samples / seconds if seconds > 0 else math.nan


class MetricQueue:
    """Metrics waiting to be logged, at most `limit` events: beyond that, every other one of the older half goes.

    Any thread adds events, and the view's thread takes them.
    """

    def __init__(self, limit: int = MAX_METRIC_ROWS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: list[MetricsLogged] = []

    def add(self, event: MetricsLogged) -> None:
        """Add what was measured."""
        with self._lock:
            self._waiting.append(event)
            if len(self._waiting) > self._limit:
                del self._waiting[: self._limit // 2 : 2]

    def take(self) -> Iterator[dict[str, float]]:
        """Take all as rows `metrics/…` with their `train/step`, the oldest first, without what is not finite."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for event in waiting:
            row = {f"metrics/{name}": value for name, value in event.metrics.items() if math.isfinite(value)}
            if row:
                yield {"train/step": event.step, **row}


class EventQueue:
    """Events of experts that change their server, or are not copied, waiting to be logged: the last `limit`.

    Any thread adds events, and the view's thread takes them.
    """

    def __init__(self, limit: int = MAX_EVENT_ROWS) -> None:
        self._waiting = deque[ExpertNews](maxlen=limit)

    def add(self, event: ExpertNews) -> None:
        """Add an event."""
        self._waiting.append(event)

    def take(self, started: float) -> Iterator[LoggedRow]:
        """Take all as rows `event/…`, the oldest first: the name, and the fields of the event.

        Args:
            started: When the swarm was started, monotonic: `event/at` counts from then.
        """
        while self._waiting:
            event = self._waiting.popleft()
            said = {f"event/{field.name}": getattr(event, field.name) for field in fields(event)}
            yield {"event/name": type(event).__name__, **said, "event/at": round(event.at - started, 3)}


def numbers_of(row: LoggedRow) -> dict[str, float]:
    """Returns the numbers in a row."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}
