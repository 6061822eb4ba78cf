"""Patience: how long a pass waits for experts that no row needs any more. Plain state, the time passed in.

On a batch's way: `client/gather` asks here when every row has its answers. A call that is lost never ends by itself, so
what it costs is the patience of the pass. Too little of it gives up experts that are merely slow.

By default each server is waited for as long as its own latencies justify. What is known of them is censored: of a call
that was given up we know only that it takes longer than that. Were such calls left out, the slow ones would vanish from
the record and patience would shrink further and further. So

1. a server that has answered all of its last calls in time is waited for as long as is allowed at all. That costs
   nothing as long as it answers, and a busy machine may make anyone late for once;
2. calls that were given up count as at least as long as they were waited for (the Kaplan-Meier estimate of the
   distribution);
3. each one in a row doubles the patience with that server, and every sixteenth is waited for as long as is allowed at
   all. So the record gets to know how long late calls take, and a network that has become slower is noticed.

Calls that are never answered, however long one waits, do not lengthen patience: the percentile is one of the answers.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from labkit.contact import Contact

FIRST_GUESS = 1.0  # seconds after the answers that were needed; for servers that have not answered often enough yet
MOST = 1.0  # seconds after the answers that were needed; or as long as those took, if that is more
LEAST = 0.05  # seconds after the answers that were needed: what is on its way into this process may still be read
LEAST_TIME = 0.3  # seconds after the request: on a busy machine, any process may stand still for so long
TRUSTED_AFTER = 512  # answers of a server since it was late last, after which it is waited for as long as is allowed
PERCENTILE = 0.95  # of the answers
MARGIN = 1.5  # times that percentile
ENOUGH_ANSWERS = 8  # of a server, before its latencies say anything
WINDOW = 64  # calls that are remembered, of each server, direction and size
EXPLORE = 16  # one of so many late calls is waited for as long as is allowed
MAX_RECORDS = 4096
MAX_DOUBLINGS = 16


class Load(NamedTuple):
    """What latencies depend on: the server, the direction, and the rows that a pass sends it, as a power of two."""

    contact: Contact
    direction: str
    size: int


def load_of(contact: Contact, direction: str, rows: int) -> Load:
    """The load of a server that gets so many rows of a pass, in all of its experts together."""
    return Load(contact, direction, rows.bit_length())


class LatencyRecord:
    """The last calls of one load."""

    def __init__(self) -> None:
        self._calls: deque[tuple[float, bool]] = deque(maxlen=WINDOW)  # seconds, and whether it was answered
        self._answers = 0
        self._late_in_a_row = 0
        self._late = 0
        self._percentile: float | None = None  # of the answers; None while it is not computed

    def note(self, seconds: float, answered: bool) -> None:
        """Note a call that was answered, or given up, after so many seconds."""
        if len(self._calls) == WINDOW:
            self._answers -= self._calls[0][1]
        self._calls.append((seconds, answered))
        self._answers += answered
        self._percentile = None
        self._late_in_a_row = 0 if answered else self._late_in_a_row + 1
        self._late += not answered

    def justified(self) -> float | None:
        """How long a call may take, in seconds; None if too little is known, infinity for as long as is allowed."""
        if self._answers < ENOUGH_ANSWERS:
            return None
        if self._late % EXPLORE == EXPLORE - 1:
            return math.inf
        if self._percentile is None:
            self._percentile = percentile(self._calls, PERCENTILE)
        return max(LEAST_TIME, MARGIN * self._percentile) * 2.0 ** min(self._late_in_a_row, MAX_DOUBLINGS)


class Latencies:
    """The latencies of the servers that are called from here."""

    def __init__(self) -> None:
        self._records: OrderedDict[Load, LatencyRecord] = OrderedDict()
        self._distrusted: OrderedDict[Contact, int] = OrderedDict()  # servers that were late: answers until forgotten

    def note(self, load: Load, seconds: float, answered: bool) -> None:
        """Note a call that was answered, or given up, after so many seconds."""
        record = self._records.get(load)
        if record is None:
            record = self._records[load] = LatencyRecord()
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(load)
        record.note(seconds, answered)
        self._note_trust(load.contact, answered)

    def _note_trust(self, contact: Contact, answered: bool) -> None:
        if not answered:
            self._distrusted[contact] = TRUSTED_AFTER
            self._distrusted.move_to_end(contact)
            if len(self._distrusted) > MAX_RECORDS:
                self._distrusted.popitem(last=False)
        elif contact in self._distrusted:
            self._distrusted[contact] -= 1
            if not self._distrusted[contact]:
                del self._distrusted[contact]

    def justified(self, load: Load) -> float | None:
        """How long a call of this load may take: seconds, None if too little is known, infinity for all there are."""
        record = self._records.get(load)
        seconds = None if record is None else record.justified()
        return seconds if seconds is None or load.contact in self._distrusted else math.inf


class Pace(NamedTuple):
    """What a pass has seen of its own answers.

    Args:
        started: When it made its first request.
        enough: When every row had its answers, or could not have them any more.
        last: When the last answer came.
        gap: The longest time between two answers of one server, or from its request to its first answer.
    """

    started: float
    enough: float
    last: float
    gap: float


class Open(NamedTuple):
    """A call under way: its load, and when it was made."""

    load: Load
    started: float


class Patience(Protocol):
    """How long a pass waits for calls that no row needs any more."""

    def until(self, pace: Pace, calls: Iterable[Open]) -> float:
        """When the pass has waited long enough for these calls, on the clock of `pace`."""


class FixedPatience:
    """Always so many seconds after the answers that were needed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def until(self, pace: Pace, calls: Iterable[Open]) -> float:
        """See `Patience`."""
        return pace.enough + self._seconds


class AdaptivePatience:
    """As long as the latencies of the servers that are waited for justify."""

    def __init__(self, latencies: Latencies) -> None:
        self._latencies = latencies

    def until(self, pace: Pace, calls: Iterable[Open]) -> float:
        """See `Patience`."""
        took = pace.enough - pace.started
        latest = pace.enough + max(MOST, took)
        until = pace.enough + LEAST
        for call in calls:
            seconds = self._latencies.justified(call.load)
            due = pace.enough + FIRST_GUESS if seconds is None else call.started + seconds
            if seconds is None or took > MOST:
                # A server computes one batch after the other: where each takes long, the next answer takes as long.
                due = max(due, pace.last + 2 * pace.gap)
            until = max(until, due)
        return min(until, latest)


def percentile(calls: Collection[tuple[float, bool]], share: float) -> float:
    """The time within which this share of those calls is answered that are answered at all (Kaplan and Meier 1958).

    Args:
        calls: Seconds, and whether there was an answer; if not, it might have come later. One answer at least.
        share: Between 0 and 1.
    """
    ordered = sorted(calls, key=lambda call: (call[0], not call[1]))
    waiting, at_risk = 1.0, len(ordered)
    points = []  # of each answer: its time, and the share of calls that take longer
    for seconds, answered in ordered:
        if answered:
            waiting *= 1 - 1 / at_risk
            points.append((seconds, waiting))
        at_risk -= 1
    never = points[-1][1]
    enough = never + (1 - share) * (1 - never) + 1e-9
    return next(seconds for seconds, waiting in points if waiting <= enough)
