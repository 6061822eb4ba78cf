"""The scene: everything that the dashboard shows at one moment, as plain columns.

`collect/sampler` makes a scene from the counted events and the last inventory. The widget's frames, the pictures, the
exports and the loggers are all made from scenes, so they agree. Tables only grow: an expert or a server keeps its row
for good.
"""

# N: experts, S: servers, B: bins of time

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from labkit.errors import CAUSES

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MODES = ("load", "latency", "failures", "staleness")  # what the heat map can show
SPLIT = ("total", "queue", "compute", "network")  # a call's latency, and its parts
PERCENTILES = (50, 95, 99)
SERIES = ("loss", "samples", "calls", "bytes", "in_flight", "staleness", *CAUSES)


class State(IntEnum):
    """The state of an expert or a server. Grid cells whose expert was never declared are unclaimed."""

    UNCLAIMED = 0
    ALIVE = 1
    SUSPECT = 2  # it failed recently or does not answer, and is not offered to trainers; it may come back
    DEAD = 3
    STARTING = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """A grid of experts: its name and its size in each dimension."""

    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """All experts that were ever seen, a row each. NaN: not known."""

    uids: Sequence[str]
    layer: Ints  # [N], index of a layer
    cell: Ints  # [N], row-major index in the grid of its layer
    server: Ints  # [N], index of a server; -1: not known
    state: Ints  # [N], a `State`
    load: Floats  # [N], rows/s over the last seconds
    latency: Floats  # [N], ms, mean of the last calls
    failures: Floats  # [N], share of the last seconds' calls that failed: 0 to 1
    staleness: Floats  # [N], updates between a forward pass and its backward pass, mean of the last ones
    calls: Ints  # [N], answered since the start
    failed: Ints  # [N], calls that failed since the start
    updates: Ints  # [N], optimizer steps made so far


@dataclass(frozen=True, slots=True)
class Servers:
    """All servers that were ever seen, a row each. NaN: not known."""

    labels: Sequence[str]  # `servers[2]` for a server started here; otherwise the label that it has, or its address
    addresses: Sequence[str]
    words: Sequence[str]  # started here: running, starting, killed, stopped, failed; elsewhere: remote, silent, gone
    local: Ints  # [S], index in `swarm.servers`; -1: started elsewhere
    state: Ints  # [S], a `State`
    heard: Floats  # [S], seconds since it last answered anything
    experts: Ints  # [S], experts that it holds
    alive: Ints  # [S], experts of these that are alive
    calls: Floats  # [S], calls/s over the last seconds
    queue: Floats  # [S], requests waiting at the server
    latency: Floats  # [S, 4, 3], ms, of the last calls: SPLIT × PERCENTILES
    failed: Ints  # [S, len(CAUSES)], calls that failed since the start
    injected: Floats  # [S, 2], injected faults: mean latency in seconds, share of calls lost

    def worst_first(self) -> list[int]:
        """Row numbers: dead servers, then suspect, starting and alive ones; within each, most failures first."""
        failed = self.failed.sum(axis=1)
        severity = [_SEVERITY.get(state, len(_SEVERITY)) for state in self.state.tolist()]
        return sorted(range(len(self.labels)), key=lambda row: (severity[row], -int(failed[row]), row))


_SEVERITY = {State.DEAD: 0, State.SUSPECT: 1, State.STARTING: 2, State.ALIVE: 3, State.UNCLAIMED: 4}


@dataclass(frozen=True, slots=True)
class Headline:
    """The numbers that are always in sight. Rates are per second, over the last seconds. NaN: not known."""

    running: bool  # whether a run is training over this swarm
    steps: int
    total_steps: int  # 0 if there was no run
    loss: float
    samples: float
    calls: float
    bytes: float
    in_flight: int
    staleness: float  # mean number of expert updates between a forward pass and its backward pass
    experts: int
    experts_alive: int
    servers: int
    servers_alive: int
    answered: int  # calls answered since the start
    failed: dict[str, int]  # cause -> calls that failed since the start; causes without any are left out
    unanswered_rows: int  # rows of forward passes without an answer, since the start


@dataclass(frozen=True, slots=True)
class Series:
    """Values by time, in completed bins. When there are too many, pairs of bins are merged and `width` doubles."""

    width: float  # seconds
    first: int  # number of the first bin; bin n covers [n × width, (n + 1) × width) seconds since the start
    values: Floats  # [B, len(SERIES)]: means of loss, staleness, in_flight; counts of causes; else rates. NaN: unknown


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to a server: it was killed, was lost or came back."""

    at: float  # seconds since the start
    text: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A swarm at one moment: what every view of it is made from."""

    at: float  # seconds since the start
    wall: float  # Unix time, for labels only
    swarm: str
    open: bool
    source: str  # "calls": counted from this process's own calls; "servers": reported by servers, as it made none
    headline: Headline
    layers: Sequence[Layer]
    experts: Experts
    servers: Servers
    series: Series
    marks: Sequence[Mark]
