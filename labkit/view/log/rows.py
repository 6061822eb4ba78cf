"""What is logged, as plain rows: of the swarm (from a scene) and of training steps (from events).

Between the scene and `loggers`, which write rows down. A row has no key per expert or server: however large the swarm,
it has the same few dozen columns.
"""

# S: servers

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from labkit.errors import CAUSES
from labkit.events import StepFinished
from labkit.view.picture.canvas import Picture
from labkit.view.scene import PERCENTILES, SPLIT, Experts, Floats, Scene, Servers, State

HISTOGRAM_BINS = 32
MAX_TABLE_ROWS = 1_000  # servers in a table, the worst first
MAX_MIXED = 100  # servers, the busiest, from which percentiles over all are made
MAX_STEPS = 500  # steps that wait to be logged
RATE_WINDOW = 20  # steps over which samples/s are taken

SEVERITY = {State.DEAD: 0, State.SUSPECT: 1, State.STARTING: 2, State.ALIVE: 3, State.UNCLAIMED: 4}


@dataclass(frozen=True, slots=True)
class LoggedHistogram:
    """`counts[i]` values lie between `bins[i]` and `bins[i + 1]`."""

    bins: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoggedTable:
    """Rows of texts and numbers; None: nothing is known."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


Value = float | LoggedHistogram | LoggedTable | Picture
Row = dict[str, Value]


# ---------------------------------------------------------------- of the swarm


def swarm_row(scene: Scene) -> Row:
    """Numbers of a scene as `swarm/…`, and the histogram of the experts' load. What is not known is left out.

    Rates are per second, of the last seconds; latencies in ms; `failures/…`, `answered` and `unanswered_rows` count
    from the start. `routing_entropy` is 1 where all experts get the same load and 0 where one gets all.
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
    }
    if scene.source == "calls":  # who makes no calls knows of no failures
        row |= {f"swarm/failures/{cause}": head.failed.get(cause, 0) for cause in CAUSES}
    for part, values in zip(SPLIT, overall_latency(scene.servers), strict=True):
        place = "swarm/latency_ms" if part == "total" else f"swarm/latency_ms/{part}"
        row |= {f"{place}/p{q}": float(value) for q, value in zip(PERCENTILES, values, strict=True)}
    known: Row = {key: value for key, value in row.items() if math.isfinite(value)}
    histogram = load_histogram(scene.experts)
    return known if histogram is None else known | {"swarm/load": histogram}


def routing_entropy(experts: Experts) -> float:
    """Entropy of the load over the experts of a layer that are offered, as a share of the most it could be: 0 to 1.

    The mean over layers; NaN if none has any load, or two experts.
    """
    found = []
    load = np.nan_to_num(experts.load.astype(np.float64))
    offered = (experts.state == State.ALIVE) | (load > 0)
    for layer in np.unique(experts.layer[offered]):
        of_layer = load[offered & (experts.layer == layer)]
        if len(of_layer) > 1 and of_layer.sum() > 0:
            share = of_layer[of_layer > 0] / of_layer.sum()
            found.append(float(-(share * np.log(share)).sum() / math.log(len(of_layer))))
    return abs(sum(found) / len(found)) if found else math.nan  # abs: of -0.0


def load_histogram(experts: Experts) -> LoggedHistogram | None:
    """How many experts get how many rows/s; None if nothing is known of any."""
    load = experts.load[np.isfinite(experts.load)].astype(np.float64)
    if not len(load):
        return None
    counts, bins = np.histogram(load, HISTOGRAM_BINS, range=(0.0, max(float(load.max()), 1e-3)))
    return LoggedHistogram(tuple(bins.tolist()), tuple(counts.tolist()))


def overall_latency(servers: Servers) -> npt.NDArray[np.float64]:
    """Latency over all servers, [SPLIT, PERCENTILES] in ms: NaN where nobody was called lately.

    A server's calls are taken to lie evenly between its percentiles, and servers count by their calls/s.
    """
    overall = np.full((len(SPLIT), len(PERCENTILES)), np.nan)
    weight = np.nan_to_num(servers.calls.astype(np.float64))
    busiest = np.argsort(-weight, kind="stable")[:MAX_MIXED]
    for part in range(len(SPLIT)):
        known = busiest[(weight[busiest] > 0) & np.isfinite(servers.latency[busiest, part]).all(axis=1)]
        if len(known):
            overall[part] = _mix(servers.latency[known, part], weight[known])
    return overall


def _mix(percentiles: Floats, weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Percentiles [3] of a mixture of distributions of which we know the percentiles [S, 3]."""
    wanted = np.array(PERCENTILES) / 100
    values = np.unique(percentiles).astype(np.float64)
    below = np.zeros(len(values))  # share of calls that took at most so long
    for known, share in zip(percentiles.astype(np.float64), weight / weight.sum(), strict=True):
        below += share * np.interp(values, [0.0, *known], [0.0, *wanted], right=1.0)
    return np.interp(wanted, below, values)


def server_table(scene: Scene) -> LoggedTable:
    """A row for each server, worst first."""
    servers = scene.servers
    columns = (
        "server", "address", "state", "heard s ago", "experts", "alive", "calls/s", "queue",
        *(f"{part} p{q} ms" for part in SPLIT for q in PERCENTILES), *CAUSES,
    )  # fmt: skip
    rows = []
    for i in worst_first(servers)[:MAX_TABLE_ROWS]:
        numbers = [
            servers.heard[i], servers.experts[i], servers.alive[i], servers.calls[i], servers.queue[i],
            *servers.latency[i].reshape(-1), *servers.failed[i],
        ]  # fmt: skip
        rows.append((servers.labels[i], servers.addresses[i], servers.words[i], *map(_known, numbers)))
    return LoggedTable(columns, tuple(rows))


def worst_first(servers: Servers) -> list[int]:
    """Indices of the servers: the dead, the suspect, those that start, the others; in each, who failed most."""
    failed = servers.failed.sum(axis=1)
    return sorted(
        range(len(servers.labels)), key=lambda i: (SEVERITY.get(State(int(servers.state[i])), 9), -int(failed[i]), i)
    )


def _known(number: float) -> float | None:
    """A Python number, or None for NaN and infinity."""
    value = float(number)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else round(value, 4)


# ---------------------------------------------------------------- of training steps


@dataclass(frozen=True, slots=True)
class Steps:
    """One step, or several in a row: means of them, and their samples in all."""

    first: int
    last: int
    count: int
    at: float  # seconds, monotonic, of the last one
    samples: int
    loss: float
    staleness: float
    seconds: float

    @classmethod
    def of(cls, event: StepFinished) -> Steps:
        return cls(event.step, event.step, 1, event.at, event.samples, event.loss, event.staleness, event.seconds)

    def merge(self, later: Steps) -> Steps:
        """These and later ones as one."""
        count = self.count + later.count

        def mean(mine: float, theirs: float) -> float:
            return (mine * self.count + theirs * later.count) / count

        return Steps(
            self.first, later.last, count, later.at, self.samples + later.samples, mean(self.loss, later.loss),
            mean(self.staleness, later.staleness), mean(self.seconds, later.seconds),
        )  # fmt: skip


class StepQueue:
    """Steps that wait to be logged: at most `limit` rows. When there are more, the older half is merged by two.

    Trainers add, the view's thread takes; neither waits for more than that.
    """

    def __init__(self, limit: int = MAX_STEPS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: list[Steps] = []
        self._recent: deque[Steps] = deque(maxlen=RATE_WINDOW + 1)  # that were taken

    def add(self, event: StepFinished) -> None:
        """Take a step that has finished."""
        steps = Steps.of(event)
        with self._lock:
            self._waiting.append(steps)
            if len(self._waiting) > self._limit:
                self._merge()

    def _merge(self) -> None:
        half = len(self._waiting) // 2
        older = self._waiting[: half - half % 2]
        self._waiting[: len(older)] = [a.merge(b) for a, b in zip(older[::2], older[1::2], strict=True)]

    def take(self) -> Iterator[dict[str, float]]:
        """All that wait, as rows `train/…`, the oldest first. `train/merged_steps` says how many a row stands for,
        where that is more than one; losses that are not finite are left out."""
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

    def _rate(self, steps: Steps) -> float:
        """Samples per second over the last rows; NaN at a run's first."""
        if steps.first == 1:
            self._recent.clear()  # another run
        self._recent.append(steps)
        seconds = steps.at - self._recent[0].at
        samples = sum(later.samples for _, later in pairwise(self._recent))
        return samples / seconds if seconds > 0 else math.nan


def plain(row: Row) -> dict[str, float]:
    """The numbers of a row."""
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}
