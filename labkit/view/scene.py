"""The scene: everything that the dashboard shows at one moment, as plain columns.

`sampler` makes one from what was counted and what was found; the widget's frames, the PNG, the exports and the loggers
are all made from it, so that they agree. Tables only grow: an expert, or a server, keeps its row for good.
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
Ints = npt.NDArray[np.int64]

MODES = ("load", "latency", "failures", "staleness")  # of the heat map
SPLIT = ("total", "queue", "compute", "network")  # of a call's latency
PERCENTILES = (50, 95, 99)
SERIES = ("loss", "samples", "calls", "bytes", "in_flight", "staleness", *CAUSES)


class State(IntEnum):
    """Of an expert or a server. A cell of the grid that nobody has ever declared is unclaimed."""

    UNCLAIMED = 0
    ALIVE = 1
    SUSPECT = 2  # it has failed lately, and is not offered, or does not answer; it may be back
    DEAD = 3
    STARTING = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """A grid of experts: its name, and its sizes."""

    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """All experts that were ever seen. NaN: nothing is known."""

    uids: Sequence[str]
    layer: Ints  # [N], index of a layer
    cell: Ints  # [N], row-major index in the grid of its layer
    server: Ints  # [N], index of a server; -1: not known
    state: Ints  # [N], a `State`
    load: Floats  # [N], rows/s, lately
    latency: Floats  # [N], ms, mean of the last calls
    failures: Floats  # [N], share of the calls that failed, lately: 0 to 1
    staleness: Floats  # [N], updates between a forward pass and its backward pass, mean of the last ones
    calls: Ints  # [N], answered since the start
    failed: Ints  # [N], since the start
    updates: Ints  # [N], optimizer steps that it has made


@dataclass(frozen=True, slots=True)
class Servers:
    """All servers that were ever seen. NaN: nothing is known."""

    labels: Sequence[str]  # `servers[2]` for one started here; else its address
    addresses: Sequence[str]
    words: Sequence[str]  # running, starting, killed, stopped, failed for one started here; else remote, silent, gone
    local: Ints  # [S], index in `swarm.servers`; -1: started elsewhere
    state: Ints  # [S], a `State`
    heard: Floats  # [S], seconds since it last answered anything
    experts: Ints  # [S], how many it holds
    alive: Ints  # [S], how many of them are offered
    calls: Floats  # [S], calls/s, lately
    queue: Floats  # [S], requests that wait there
    latency: Floats  # [S, 4, 3], ms, of the last calls: SPLIT × PERCENTILES
    failed: Ints  # [S, len(CAUSES)], since the start
    injected: Floats  # [S, 2], mean latency in seconds, and loss as a share


@dataclass(frozen=True, slots=True)
class Headline:
    """The numbers that are always in sight. Rates are per second, of the last seconds. NaN: nothing is known."""

    running: bool  # whether a run trains over this swarm now
    steps: int
    total_steps: int  # 0: there was no run
    loss: float
    samples: float
    calls: float
    bytes: float
    in_flight: int
    staleness: float  # expert updates between a forward pass and its backward pass, mean
    experts: int
    experts_alive: int
    servers: int
    servers_alive: int
    answered: int  # calls, since the start
    failed: dict[str, int]  # cause -> own calls, since the start; causes with none are left out
    unanswered_rows: int  # in forward passes, since the start


@dataclass(frozen=True, slots=True)
class Series:
    """Values by time, in bins that are over. When there are too many, bins are merged by two and `width` doubles."""

    width: float  # seconds
    first: int  # number of the first bin here; bin n covers [n × width, (n + 1) × width) seconds since the start
    values: Floats  # [B, len(SERIES)]: loss, staleness, in_flight are means, causes counts, others rates; NaN: unknown


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to a server: killed, lost, back. `at`: seconds since the start."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A swarm at one moment."""

    at: float  # seconds since the start
    wall: float  # Unix time, for labels only
    swarm: str
    open: bool
    source: str  # "calls": counted from this process's own calls; "servers": it made none; from what servers report
    headline: Headline
    layers: Sequence[Layer]
    experts: Experts
    servers: Servers
    series: Series
    marks: Sequence[Mark]
