"""Virtual time for simulations: as soon as all tasks wait, the clock jumps to the time of whatever comes next.

trio's `MockClock(autojump_threshold=0)` does the same, and `simulation/network` works under it as well. But simulations
of thousands of nodes spend a good part of their time in that clock, in timers, and in garbage collection.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from labkit.wire.timers import Timers

T = TypeVar("T")

IDLE_SLEEP = 3600.0  # seconds of real time to wait when nothing is due; something outside may wake the run meanwhile
# As `gc.set_threshold` takes them. Little of what nodes send each other is ever in a cycle, and to search all that
# thousands of them hold would take seconds each time.
GC_THRESHOLDS = (50_000, 50, 1000)


class VirtualClock(trio.abc.Clock):
    """A clock for `trio.run` that jumps. `alarm` is for one task that wakes at many times, such as that of `Timers`."""

    def __init__(self) -> None:
        self.alarm = VirtualAlarm()
        self._now = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Jump to the next deadline, or to the alarm. trio asks this when all tasks wait."""
        then = min(deadline, self.alarm.time if self.alarm.sleeper is not None else math.inf)
        if then == math.inf:
            return IDLE_SLEEP
        self._now = max(self._now, then)
        if self.alarm.time <= self._now:
            self.alarm.ring()
        return 0.0


class VirtualAlarm:
    """The `wire.timers.Alarm` of a virtual clock, which rings it: a sleep without a deadline of trio's."""

    def __init__(self) -> None:
        self.time = math.inf
        self.sleeper: trio.lowlevel.Task | None = None  # the task in `wait`

    def set(self, time: float) -> None:
        self.time = time

    def postpone(self, time: float) -> None:
        self.time = time  # else virtual time would go on to what was cancelled

    async def wait(self) -> None:
        assert self.sleeper is None, "one task at a time"
        self.sleeper = trio.lowlevel.current_task()

        def abort(_: Any) -> trio.lowlevel.Abort:
            self.sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def ring(self) -> None:
        """Wake the task that sleeps, if there is one."""
        if self.sleeper is not None:
            trio.lowlevel.reschedule(self.sleeper)
            self.sleeper = None


def make_timers() -> Timers:
    """Make the timers of a network in this trio run, on its virtual clock if it has one."""
    clock = trio.lowlevel.current_clock()
    return Timers(clock.alarm if isinstance(clock, VirtualClock) else None)


def run_in_virtual_time(
    function: Callable[..., Awaitable[T]], *args: Any, collect_after: tuple[int, int, int] = GC_THRESHOLDS
) -> T:
    """`trio.run(function, *args)`, in virtual time. Returns what `function` returns.

    Args:
        function: An async function.
        args: Its positional arguments.
        collect_after: Garbage collector's thresholds during the run, as `gc.set_threshold` takes them.
    """
    before = gc.get_threshold()
    gc.set_threshold(*collect_after)
    try:
        return trio.run(function, *args, clock=VirtualClock())
    finally:
        gc.set_threshold(*before)
