"""Experts that moved: events of what servers report, unless those that were started here have told it themselves.

Servers started here tell at once (`launch/child`); `inventory` hears of all when it asks them for their statistics.
Each tells of the last experts that it has taken over, or was given, again and again, and here each becomes one event.
Who gives an expert may be gone when it could be asked, or have lost the worker of a cluster over which it tells: that
is why the other one tells it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from labkit.events import Emit, Event, ExpertHandedOver, ExpertTakenOver
from labkit.server.statistics import ServerStatistics

MAX_KNOWN = 20_000  # moves that were heard of
SLACK = 1.0  # seconds by which a report may be older than it says
TELLING_TIME = 5.0  # seconds that a server which was started here has to tell of a move itself


class ReportedTakeOvers:
    """Makes an `ExpertTakenOver` or an `ExpertHandedOver` of each move that is reported, once for each epoch.

    `hear` has to be called with the events that there are.

    Args:
        emit: Gets the events.
        since: Monotonic time; what was before is no news.
    """

    def __init__(self, emit: Emit, since: float) -> None:
        self._emit = emit
        self._since = since
        self._known = OrderedDict[tuple[str, int], None]()

    def hear(self, event: Event) -> None:
        """Note what a server has told itself."""
        if isinstance(event, ExpertTakenOver | ExpertHandedOver):
            self._note(event.uid, event.epoch)

    def take(self, address: str, statistics: ServerStatistics, now: float, own: Collection[str] = ()) -> None:
        """Learn from what a server reports.

        Args:
            address: `host:port` of the server.
            statistics: What it says.
            now: Monotonic time.
            own: The servers that were started here. They tell themselves what they have taken over, or given, if they
                can.
        """
        copies = statistics.copies
        for taken in copies.takeovers if copies is not None else ():
            if address in own and taken.ago < TELLING_TIME:
                continue
            if (at := self._news(taken.uid, taken.epoch, now - taken.ago)) is not None:
                self._emit(
                    ExpertTakenOver(
                        at=at, uid=taken.uid, address=address, before=taken.before, epoch=taken.epoch,
                        lost_updates=taken.lost_updates, seconds=taken.seconds,
                    )
                )  # fmt: skip
        for given in copies.handovers if copies is not None else ():
            if given.before in own and given.ago < TELLING_TIME:
                continue
            if (at := self._news(given.uid, given.epoch, now - given.ago)) is not None:
                self._emit(ExpertHandedOver(at=at, uid=given.uid, address=given.before, to=address, epoch=given.epoch))

    def _news(self, uid: str, epoch: int, at: float) -> float | None:
        """Returns when it happened; None if that is known, or no news."""
        if (uid, epoch) in self._known:
            return None
        self._note(uid, epoch)
        return at if at >= self._since - SLACK else None

    def _note(self, uid: str, epoch: int) -> None:
        self._known[uid, epoch] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
