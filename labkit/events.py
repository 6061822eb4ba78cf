"""Events: facts that long-lived objects report while they work, as frozen records.

Such an object takes `emit` and calls it synchronously. `emit` must not block, and no error of a listener reaches the
object that emits. `Swarm.on_event` adds a listener; telemetry is one. Every event has `at`, seconds on this process's
monotonic clock, which can be compared only within one process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from labkit.contact import Contact

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of all events. `at`: seconds on the monotonic clock of this process."""

    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingChosen(Event):
    """A pass of an MoE layer has chosen its experts.

    Args:
        prefix: Name of the grid.
        rows: How many rows of the batch each expert gets, by uid.
    """

    prefix: str
    rows: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFinished(Event):
    """An expert has answered a call.

    Args:
        uid: The expert.
        address: `host:port` of its server.
        direction: "forward" or "backward".
        rows: How many rows were sent.
        seconds: Time from the call to the answer.
        queue: Seconds that the request waited at the server, by the server's own count.
        compute: Seconds that the batch took to compute, by the server's own count.
        bytes: Size of request and answer.
        updates: Optimizer steps that the expert had made when it answered.
        staleness: Optimizer steps that the expert made for others between the forward pass of these rows and this
            backward pass; None for a forward pass, and if it is not known.
    """

    uid: str
    address: str
    direction: str
    rows: int
    seconds: float
    queue: float
    compute: float
    bytes: int
    updates: int
    staleness: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed(Event):
    """An expert has not answered a call. `cause` is one of `errors.CAUSES`, `detail` is the error's text."""

    uid: str
    address: str
    direction: str
    rows: int
    seconds: float
    cause: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsUnanswered(Event):
    """Some rows of a pass of an MoE layer got fewer answers than they needed."""

    prefix: str
    direction: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFinished(Event):
    """A pass of an MoE layer has ended: every row has its answers, or can't have them.

    Args:
        prefix: Name of the grid.
        direction: "forward" or "backward".
        rows: How many rows the batch has.
        seconds: Time of the whole pass, the search for experts included.
        waited: Seconds of these that the pass waited for experts that no row needed any more.
        patience: Seconds that it would have waited for them at most.
        late: The experts that it gave up, by uid.
    """

    prefix: str
    direction: str
    rows: int
    seconds: float
    waited: float
    patience: float
    late: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProcessed(Event):
    """A server has computed a batch of `requests` requests for one expert, in `seconds` seconds."""

    uid: str
    direction: str
    rows: int
    requests: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDeclared(Event):
    """A server has declared an expert in the DHT, for `ttl` seconds."""

    uid: str
    address: str
    ttl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGivenUp(Event):
    """A server has given an expert up, since another one has served it for longer.

    Args:
        uid: The expert.
        address: `host:port` of the server that gives it up.
        to: `host:port` of the server that keeps it.
        lost_updates: Optimizer steps that it has made here and that are lost, beyond those that the other server has
            counted when it took the expert over.
    """

    uid: str
    address: str
    to: str
    lost_updates: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTakenOver(Event):
    """A server goes on with an expert from its copy, since the expert's server is gone.

    Args:
        uid: The expert.
        address: `host:port` of the server that has it now.
        before: `host:port` of the server that had it.
        epoch: The expert's epoch from now on.
        lost_updates: Optimizer steps that the copy lacks, as far as they are known.
        seconds: How long nobody served the expert.
    """

    uid: str
    address: str
    before: str
    epoch: int
    lost_updates: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertHandedOver(Event):
    """A server has handed an expert over to another one, without losing anything.

    Args:
        uid: The expert.
        address: `host:port` of the server that had it.
        to: `host:port` of the server that has it now.
        epoch: The expert's epoch from now on.
    """

    uid: str
    address: str
    to: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyStored(Event):
    """Another server has confirmed a copy of an expert.

    Args:
        uid: The expert.
        address: `host:port` of the server that holds the copy.
        updates: Optimizer steps that the expert had made.
    """

    uid: str
    address: str
    updates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyFailed(Event):
    """A copy of an expert could not be stored. What was there before is still there.

    Args:
        uid: The expert.
        address: `host:port` of the server that was to hold it.
        cause: One of `errors.CAUSES`.
        detail: The error's text.
    """

    uid: str
    address: str
    cause: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLost(Event):
    """A server is found to be gone. `uids`: its experts, as far as they were known here."""

    address: str
    uids: tuple[str, ...]
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressChanged(Event):
    """A node of this process is reached at another address than before, and has told the swarm so.

    Args:
        contact: The node, as it is reached now.
        before: `host:port` at which it was reached.
        reason: Why, in words.
    """

    contact: Contact
    before: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachabilityChanged(Event):
    """It is known, or known anew, whether other machines reach a node of this process.

    Args:
        contact: The node, as it is to be reached.
        state: "reachable", "not reachable", "only from this machine" or "not known yet".
        text: The same as a sentence, with what to try.
    """

    contact: Contact
    state: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayChanged(Event):
    """A node of this process, which takes no connections, has found or lost the relay that takes them for it.

    Args:
        relay: `host:port` of the relay's node; empty if there is none now.
        detail: More about it, in words; if there is none, why, and what to try.
    """

    relay: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished(Event):
    """A training step was applied. `staleness`: updates that other trainers applied since its forward pass began."""

    step: int
    loss: float
    samples: int
    seconds: float
    staleness: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLogged(Event):
    """Somebody has measured something at a training step: a validation, a metric of `lk.fit`, or `swarm.log`.

    Args:
        step: The step after which it was measured.
        metrics: The numbers by name, such as "validation loss" or "accuracy".
    """

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed(Event):
    """A trainer has given up a batch. `detail` says why."""

    samples: int
    detail: str


AddressNews = AddressChanged | ReachabilityChanged
ExpertNews = ExpertTakenOver | ExpertHandedOver | ExpertGivenUp | CopyFailed
Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `Emit` that does nothing."""


class Listeners:
    """Passes each event on to all listeners. One that raises is logged and removed. It is an `Emit` itself."""

    def __init__(self) -> None:
        self._listeners: tuple[Emit, ...] = ()

    def add(self, listener: Emit) -> Callable[[], None]:
        """Call `listener` with each event from now on. Returns a function that ends this."""
        self._listeners = (*self._listeners, listener)
        return lambda: self.remove(listener)

    def remove(self, listener: Emit) -> None:
        """Stop calling `listener`."""
        self._listeners = tuple(other for other in self._listeners if other is not listener)

    def __call__(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except (Exception, SystemExit, GeneratorExit):  # none of its errors reaches the object that emits
                logger.exception("the listener %r failed and was removed", listener)
                self.remove(listener)
