"""Experts that were taken over elsewhere: events of servers that others have started, from what these report.

Servers started here tell by themselves (`launch/child`); `inventory` hears of the others when it asks them for their
statistics. Each of these tells of its last take-overs, again and again, and here each becomes one event.
"""

from __future__ import annotations

from collections import OrderedDict

from labkit.events import Emit, ExpertTakenOver
from labkit.server.statistics import ServerStatistics

MAX_KNOWN = 20_000  # take-overs that were heard of
SLACK = 1.0  # seconds by which a report may be older than it says


class ReportedTakeOvers:
    """Makes an `ExpertTakenOver` of each take-over that is reported, once for each expert and epoch.

    Args:
        emit: Gets the events.
        since: Monotonic time; what was before is no news.
    """

    def __init__(self, emit: Emit, since: float) -> None:
        self._emit = emit
        self._since = since
        self._known = OrderedDict[tuple[str, int], None]()

    def take(self, address: str, statistics: ServerStatistics, now: float) -> None:
        """Learn from what a server reports, at a monotonic time."""
        for one in statistics.copies.takeovers if statistics.copies is not None else ():
            which, at = (one.uid, one.epoch), now - one.ago
            if which in self._known:
                continue
            self._known[which] = None
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
            if at >= self._since - SLACK:
                self._emit(
                    ExpertTakenOver(
                        at=at, uid=one.uid, address=address, before=one.before, epoch=one.epoch,
                        lost_updates=one.lost_updates, seconds=one.seconds,
                    )
                )  # fmt: skip
