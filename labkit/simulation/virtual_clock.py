"""Virtual time for simulations: when all tasks wait, it is at once the time of whatever comes next.

trio's `MockClock(autojump_threshold=0)` does the same, and `simulation/network` works under it as well; but simulations
of thousands of nodes spend a good part of their time in it, in timers, and in garbage collection.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

T = TypeVar("T")

NEVER = 3600.0  # seconds of real time; something outside may wake the run meanwhile
# As `gc.set_threshold`. Little of what nodes say to each other is ever in a cycle, and to look through all that
# thousands of them hold would take seconds each time.
COLLECT_AFTER = (50_000, 50, 1000)


class VirtualClock(trio.abc.Clock):
    """A clock with one alarm, for a task that has much to do at times that change all the while."""

    def __init__(self) -> None:
        self.alarm = math.inf  # when to wake the task in `wait_for_alarm`
        self._now = 0.0
        self._sleeper: trio.lowlevel.Task | None = None

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """trio asks this when all tasks wait."""
        then = min(deadline, self.alarm if self._sleeper is not None else math.inf)
        if then == math.inf:
            return NEVER
        self._now = max(self._now, then)
        if self._sleeper is not None and self.alarm <= self._now:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None
        return 0.0

    async def wait_for_alarm(self) -> None:
        """Sleep until it is the time of the alarm. One task at a time."""
        assert self._sleeper is None
        self._sleeper = trio.lowlevel.current_task()

        def abort(_: Any) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)


def run_in_virtual_time(
    function: Callable[..., Awaitable[T]], *args: Any, collect_after: tuple[int, int, int] = COLLECT_AFTER
) -> T:
    """`trio.run`, in virtual time. `collect_after`: as `gc.set_threshold`, meanwhile."""
    before = gc.get_threshold()
    gc.set_threshold(*collect_after)
    try:
        return trio.run(function, *args, clock=VirtualClock())
    finally:
        gc.set_threshold(*before)
