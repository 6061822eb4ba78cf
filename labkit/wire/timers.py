"""What a network has to do later, at which time of trio's clock: one task, however much it is.

A task of its own for each delay, with a cancel scope for its end, costs several times what most of them do.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import trio

from labkit.simulation.virtual_clock import VirtualClock

Timer = list[Any]  # time, order, action, arguments; without an action when it is done, or is not to be done any more
_ACTION = 2
MOST_VOID = 1000  # entries that are not to be done and are kept nevertheless, if there are as many others


class Timers:
    """Calls functions in the thread of trio, each at its time, while `run` runs. One for each trio run."""

    def __init__(self) -> None:
        self._due: list[Timer] = []  # a heap
        self._void = 0  # how many of them are cancelled
        self._entries = itertools.count()
        self._clock = trio.lowlevel.current_clock()
        self._sleep = trio.CancelScope()  # until the next thing is to be done
        self._wake = math.inf  # when that ends

    def after(self, seconds: float, action: Callable[..., object], *args: Any) -> None:
        """Do something so many seconds from now; if none, at once."""
        if seconds > 0:
            self.at(trio.current_time() + seconds, action, *args)
        else:
            action(*args)

    def at(self, time: float, action: Callable[..., object], *args: Any) -> Timer:
        """Do something then. What is to be done at the same time is done in the order in which it was asked for.
        Returns what `cancel` takes."""
        entry = [time, next(self._entries), action, args]
        heapq.heappush(self._due, entry)
        if time < self._wake:
            self._wake_at(time)
        return entry

    def cancel(self, entry: Timer) -> None:
        """Don't do it, if it is not done yet."""
        if entry[_ACTION] is None:
            return
        entry[_ACTION:] = None, None  # and forget what it holds
        self._void += 1
        if self._due[0] is entry:
            self._skip_void()
            if isinstance(self._clock, VirtualClock):  # which would go on to that time; else waking once is cheaper
                self._wake_at(self._due[0][0] if self._due else math.inf)
        elif self._void > MOST_VOID and 2 * self._void > len(self._due):
            self._due = [other for other in self._due if other[_ACTION] is not None]
            heapq.heapify(self._due)
            self._void = 0

    def _skip_void(self) -> None:
        while self._due and self._due[0][_ACTION] is None:
            heapq.heappop(self._due)
            self._void -= 1

    def _wake_at(self, time: float) -> None:
        self._wake = time
        if isinstance(self._clock, VirtualClock):
            self._clock.alarm = time
        else:
            self._sleep.deadline = time

    async def run(self) -> None:
        """Do what is to be done, when it is, until cancelled."""
        while True:
            if isinstance(self._clock, VirtualClock):
                await self._clock.wait_for_alarm()
            else:
                with trio.CancelScope(deadline=self._wake) as self._sleep:
                    await trio.sleep_forever()
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                entry = heapq.heappop(self._due)
                _, _, action, args = entry
                if action is None:
                    self._void -= 1
                else:
                    entry[_ACTION:] = None, None
                    action(*args)
            self._skip_void()
            self._wake_at(self._due[0][0] if self._due else math.inf)
