"""Timers: one task of a network calls many functions, each at its time.

Deadlines of calls, and messages of the simulated network, wait here. A task of its own for each delay, with a cancel
scope to end it, would cost several times what most of these functions do.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import trio

Timer = list[Any]  # time, number, action, arguments; the action is None once it was called or cancelled
_ACTION = 2
MAX_CANCELLED = 1000  # timers; beyond, cancelled ones are removed from the heap when they are more than half of it


class Alarm(Protocol):
    """Wakes one task. The time at which it does may be changed while the task sleeps."""

    time: float  # when it rings, on trio's clock; `math.inf` for never

    def set(self, time: float) -> None:
        """Ring at `time` instead."""

    def postpone(self, time: float) -> None:
        """Note that nothing is due before `time` any more. The alarm may still ring at the earlier time."""

    async def wait(self) -> None:
        """Sleep until the alarm rings."""


class TrioAlarm:
    """An `Alarm` on whatever clock trio runs with."""

    def __init__(self) -> None:
        self.time = math.inf
        self._scope = trio.CancelScope()  # around the sleep

    def set(self, time: float) -> None:
        self.time = time
        self._scope.deadline = time

    def postpone(self, time: float) -> None:
        pass  # to wake once for nothing is cheaper than to move the deadline each time

    async def wait(self) -> None:
        with trio.CancelScope(deadline=self.time) as self._scope:
            await trio.sleep_forever()


class Timers:
    """Calls functions in trio's thread, each at its time, while `run` runs.

    A network has one. `alarm` wakes it, by default on trio's clock; a simulation passes that of its virtual clock.
    """

    def __init__(self, alarm: Alarm | None = None) -> None:
        self._due: list[Timer] = []  # a heap
        self._cancelled = 0  # how many timers of the heap are cancelled
        self._numbers = itertools.count()
        self._alarm: Alarm = alarm or TrioAlarm()

    def after(self, seconds: float, action: Callable[..., object], *args: Any) -> None:
        """Call `action(*args)` in `seconds` seconds; at once if that is not above 0."""
        if seconds > 0:
            self.at(trio.current_time() + seconds, action, *args)
        else:
            action(*args)

    def at(self, time: float, action: Callable[..., object], *args: Any) -> Timer:
        """Call `action(*args)` at `time`, on trio's clock. Returns the timer, for `cancel`.

        Timers of the same time run in the order in which they were made.
        """
        timer = [time, next(self._numbers), action, args]
        heapq.heappush(self._due, timer)
        if time < self._alarm.time:
            self._alarm.set(time)
        return timer

    def cancel(self, timer: Timer) -> None:
        """Never run this timer. Does nothing if it has run or was cancelled."""
        if timer[_ACTION] is None:
            return
        timer[_ACTION:] = None, None  # which lets go of what they refer to
        self._cancelled += 1
        if self._due[0] is timer:
            self._drop_cancelled()
            self._alarm.postpone(self._next_time())
        elif self._cancelled > MAX_CANCELLED and 2 * self._cancelled > len(self._due):
            self._due = [other for other in self._due if other[_ACTION] is not None]
            heapq.heapify(self._due)
            self._cancelled = 0

    async def run(self) -> None:
        """Run each timer when it is due, until cancelled."""
        while True:
            await self._alarm.wait()
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                timer = heapq.heappop(self._due)
                _, _, action, args = timer
                if action is None:
                    self._cancelled -= 1
                else:
                    timer[_ACTION:] = None, None
                    action(*args)
            self._drop_cancelled()
            self._alarm.set(self._next_time())

    def _drop_cancelled(self) -> None:
        while self._due and self._due[0][_ACTION] is None:
            heapq.heappop(self._due)
            self._cancelled -= 1

    def _next_time(self) -> float:
        return float(self._due[0][0]) if self._due else math.inf
