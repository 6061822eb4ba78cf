"""Experts that moved elsewhere: events of servers that others have started, from what these report.

Servers started here tell by themselves (`launch/child`); `inventory` hears of the others when it asks them for their
statistics. Each of these tells of the last experts that it has taken over, or was given, again and again, and here each
becomes one event. Who gives an expert may be gone when it could be asked: that is why the other one tells it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from labkit.events import Emit, ExpertHandedOver, ExpertTakenOver
from labkit.server.statistics import ServerStatistics

MAX_KNOWN = 20_000  # moves that were heard of
SLACK = 1.0  # seconds by which a report may be older than it says


class ReportedTakeOvers:
    """Makes an `ExpertTakenOver` or an `ExpertHandedOver` of each move that is reported, once for each epoch.

    Args:
        emit: Gets the events.
        since: Monotonic time; what was before is no news.
    """

    def __init__(self, emit: Emit, since: float) -> None:
        self._emit = emit
        self._since = since
        self._known = OrderedDict[tuple[str, int], None]()

    def take(self, address: str, statistics: ServerStatistics, now: float, own: Collection[str] = ()) -> None:
        """Learn from what a server reports.

        Args:
            address: `host:port` of the server.
            statistics: What it says.
            now: Monotonic time.
            own: The servers that were started here. They tell themselves what they have taken over, or given.
        """
        copies = statistics.copies
        for taken in copies.takeovers if copies is not None and address not in own else ():
            if (at := self._news(taken.uid, taken.epoch, now - taken.ago)) is not None:
                self._emit(
                    ExpertTakenOver(
                        at=at, uid=taken.uid, address=address, before=taken.before, epoch=taken.epoch,
                        lost_updates=taken.lost_updates, seconds=taken.seconds,
                    )
                )  # fmt: skip
        for given in copies.handovers if copies is not None else ():
            if given.before not in own and (at := self._news(given.uid, given.epoch, now - given.ago)) is not None:
                self._emit(ExpertHandedOver(at=at, uid=given.uid, address=given.before, to=address, epoch=given.epoch))

    def _news(self, uid: str, epoch: int, at: float) -> float | None:
        """Returns when it happened; None if that is known, or no news."""
        which = uid, epoch
        if which in self._known:
            return None
        self._known[which] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return at if at >= self._since - SLACK else None
