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

from labkit.wire.simclock import VirtualClock


class Agenda:
    """Calls functions in the thread of trio, each at its time, while `run` runs. One for each trio run."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []  # a heap
        self._entries = itertools.count()
        self._clock = trio.lowlevel.current_clock()
        self._sleep = trio.CancelScope()  # until the next thing is to be done

    def after(self, seconds: float, action: Callable[..., object], *args: Any) -> None:
        """Do something so many seconds from now; if none, at once."""
        if seconds > 0:
            self.at(trio.current_time() + seconds, action, *args)
        else:
            action(*args)

    def at(self, time: float, action: Callable[..., object], *args: Any) -> None:
        """Do something then. What is to be done at the same time is done in the order in which it was asked for."""
        earliest = not self._due or time < self._due[0][0]
        heapq.heappush(self._due, (time, next(self._entries), action, args))
        if earliest:
            self._wake_at(time)

    def _wake_at(self, time: float) -> None:
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
                with trio.CancelScope(deadline=self._due[0][0] if self._due else math.inf) as self._sleep:
                    await trio.sleep_forever()
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                _, _, action, args = heapq.heappop(self._due)
                action(*args)
            self._wake_at(self._due[0][0] if self._due else math.inf)
