"""Facts that long-lived objects push while they work, as frozen records.

`emit` is called synchronously, never blocks and never raises into the one who emits. Listeners live in `view/` and
`swarm.py`. Every record carries `at`: seconds on this process's monotonic clock, comparable only within one process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events. `at`: seconds, monotonic, local to this process."""

    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingChosen(Event):
    """One pass of an MoE layer chose its experts. `rows`: how many rows each expert gets."""

    prefix: str
    rows: dict[str, int]  # expert uid -> rows of this batch


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFinished(Event):
    """An expert answered. Times in seconds; `queue` and `compute` are the server's own figures.

    `staleness`: optimizer steps that the expert made for others between the forward pass of these rows and this
    backward pass; None for a forward pass, and where it is not known.
    """

    uid: str
    address: str
    direction: str  # "forward" | "backward"
    rows: int
    seconds: float
    queue: float
    compute: float
    bytes: int
    updates: int  # optimizer steps that the expert had made when it answered
    staleness: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed(Event):
    """An expert did not answer. `cause` is one of `errors.CAUSES`; `detail` is the error's text."""

    uid: str
    address: str
    direction: str
    rows: int
    seconds: float
    cause: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsUnanswered(Event):
    """Rows of one pass of an MoE layer got fewer answers than they needed."""

    prefix: str
    direction: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProcessed(Event):
    """A runtime ran one batch for one expert, gathered from `requests` requests. `seconds`: compute time."""

    uid: str
    direction: str
    rows: int
    requests: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDeclared(Event):
    """A server announced an expert in the DHT. `ttl`: seconds until the record expires."""

    uid: str
    address: str
    ttl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLost(Event):
    """A server was found to be gone. `uids`: the experts that went with it, as far as they were known here."""

    address: str
    uids: tuple[str, ...]
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished(Event):
    """One training step was applied. `staleness`: updates that others applied since its forward pass began."""

    step: int
    loss: float
    samples: int
    seconds: float
    staleness: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed(Event):
    """A trainer's batch was given up. `detail` says why."""

    samples: int
    detail: str


Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener for nobody."""


class Listeners:
    """Passes each event on to every listener; one that raises is logged and removed. Itself an `Emit`."""

    def __init__(self) -> None:
        self._listeners: tuple[Emit, ...] = ()

    def add(self, listener: Emit) -> Callable[[], None]:
        """Listen from now on. Returns a function that ends it."""
        self._listeners = (*self._listeners, listener)
        return lambda: self.remove(listener)

    def remove(self, listener: Emit) -> None:
        self._listeners = tuple(other for other in self._listeners if other is not listener)

    def __call__(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("the listener %r failed and was removed", listener)
                self.remove(listener)
