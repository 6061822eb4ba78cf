"""The scene: everything that the dashboard shows at one moment, as plain columns.

`collect/sampler` makes a scene from the counted events and the last inventory. The widget's frames, the pictures, the
exports and the loggers are all made from scenes, so they agree. Tables only grow: an expert or a server keeps its row
for good.
"""

# N: experts, S: servers, B: bins of time, P: points of a curve

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from labkit.errors import CAUSES
from labkit.server.statistics import CopyStatistics

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

ALL_LAYERS = 65_535  # instead of a layer's number: a page looks at all of them at once
MODES = ("load", "latency", "failures", "staleness")  # what the heat map can show
SPLIT = ("total", "queue", "compute", "network")  # a call's latency, and its parts
PERCENTILES = (50, 95, 99)
USUAL_PERIOD = 10.0  # seconds between two copies of an expert that learns
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
    adopted: Bools  # [N], whether its server took it over, or was given it


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
    copies: Floats  # [S], copies of others' experts that it keeps
    adopted: Floats  # [S], experts that it did not begin with

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
    logging: bool = False  # whether a loop of one's own has logged a step lately (`Swarm.log`)
    at_risk: float = math.nan  # experts that nobody else has a fresh copy of; NaN if no server makes copies
    taken_over: int = 0  # experts that were taken over from servers that are gone, since the start
    updates_lost: int = 0  # optimizer steps of theirs that went with it, as far as they are known


@dataclass(frozen=True, slots=True)
class Series:
    """Values by time, in completed bins. When there are too many, pairs of bins are merged and `width` doubles."""

    width: float  # seconds
    first: int  # number of the first bin; bin n covers [n × width, (n + 1) × width) seconds since the start
    values: Floats  # [B, len(SERIES)]: means of loss, staleness, in_flight; counts of causes; else rates. NaN: unknown


@dataclass(frozen=True, slots=True)
class Curve:
    """Something that was measured while training, such as a validation loss: at most a few hundred points.

    When there are too many, pairs of neighbours become their mean, and `version` grows. Else points are only added.
    """

    name: str
    version: int
    at: Doubles  # [P], seconds since the start
    step: Ints  # [P]
    value: Doubles  # [P]; NaN: it was not a finite number


@dataclass(frozen=True, slots=True)
class Waits:
    """How long passes of one layer took lately, and what they waited for. Times are means, in seconds."""

    layer: str
    direction: str  # "forward" or "backward"
    seconds: float  # of a whole pass
    waited: float  # of these, for experts that no row needed any more
    patience: float  # what they would wait at most
    late: tuple[tuple[str, str], ...]  # experts that were given up, and their servers, most often first; a few

    @property
    def words(self) -> str:
        """As a sentence."""
        if self.patience == 0 and self.waited == 0:  # such as with k_min=k_best
            return f"a {self.direction} pass takes {seconds_text(self.seconds)}, all of it for answers that rows need"
        part = f"{seconds_text(self.waited)} of it" if self.waited >= 0.0005 else "none of it"
        text = f"a {self.direction} pass takes {seconds_text(self.seconds)}, {part} waiting for stragglers"
        if self.patience > 0:
            text += f"; waits at most {seconds_text(self.patience)}"
        if not self.late:
            return text
        return f"{text}; late most: {', '.join(f'{uid} on {server}' if server else uid for uid, server in self.late)}"


def seconds_text(seconds: float) -> str:
    """Returns a time to two figures, in s or ms: 0.21 s, 12 ms."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def waits_lines(waits: Sequence[Waits]) -> list[str]:
    """Returns a sentence for each; where there are several layers, it begins with the layer's name."""
    several = len({one.layer for one in waits}) > 1
    return [f"{one.layer}: {one.words}" if several else one.words for one in waits]


@dataclass(frozen=True, slots=True)
class CopySummary:
    """How safe the experts are whose servers make copies: whether others hold fresh ones. Of servers that say so."""

    backups: int  # copies that each expert is to have, at most
    servers: int  # that take part
    experts: int  # of servers that make copies
    at_risk: int  # of these, without a fresh copy elsewhere
    adopted: int  # experts that their servers did not begin with
    period: float  # seconds between two copies of an expert that learns, as promised where that is longest

    @property
    def words(self) -> str:
        """As a sentence."""
        some, one = f"{self.at_risk:,} of {count_text(self.experts, 'expert')}", self.experts == 1
        if self.at_risk == 0:
            words = f"copies: each expert has {'one' if self.backups == 1 else 'some'} elsewhere"
        elif self.servers == 1:
            words = f"{some} {'has' if one else 'have'} no copy elsewhere: with one server there is nowhere to put it"
        else:
            words = f"{some} {'is' if one else 'are'} at risk: no other server has a fresh copy"
        if self.period > USUAL_PERIOD:
            words += f"; so large that each is copied every {seconds_text(self.period)}"
        if self.adopted:
            words += f"; {self.adopted:,} adopted from other servers"
        return words


def copies_of(said: Iterable[CopyStatistics | None]) -> CopySummary | None:
    """Returns how safe the experts are, by what servers say; None if none of them makes copies."""
    known = [one for one in said if one is not None]
    if not any(one.backups for one in known):
        return None
    return CopySummary(
        backups=max(one.backups for one in known),
        servers=len(known),
        experts=sum(one.copied + one.at_risk for one in known),
        at_risk=sum(one.at_risk for one in known),
        adopted=sum(len(one.adopted) for one in known),
        period=max(one.period for one in known),
    )


def count_text(count: int, thing: str) -> str:
    """Returns a number of things: 1 expert, 2 experts."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to a server: it was killed, lost or came back, or its experts went to others."""

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
    curves: Sequence[Curve] = ()  # in the order in which their names were first logged
    waits: Sequence[Waits] = ()  # of layers that were called lately
    reachability: Sequence[str] = ()  # whether others reach our node and servers, in sentences
    copies: CopySummary | None = None  # how safe the experts are; None if no server makes copies
