"""A server's pulse: it notices that it was frozen, and answers no call until it knows which experts are still its own.

On a batch's way: `holdings.check` asks here. A process that was stopped (SIGSTOP), a machine that slept, or a thread
that was blocked for long goes on as if nothing had happened, and finds the requests of before. Others have taken its
experts over meanwhile.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

BEAT = 0.5  # seconds between two beats
LATE = 2.0  # seconds without one after which the server was away; shorter than others wait for a server that is silent


class Pulse:
    """Beats while the server runs. `run` has to run.

    Args:
        look_around: Finds out which experts are still ours, and gives up the others.
        clock: Returns seconds, those included for which the machine slept.
    """

    def __init__(self, look_around: Callable[[], Awaitable[object]], clock: Callable[[], float]) -> None:
        self._look_around = look_around
        self._clock = clock
        self._last = clock()

    @property
    def is_late(self) -> bool:
        """Whether the server was away, and does not know yet what is still its own."""
        return self._clock() - self._last > LATE

    async def run(self) -> None:
        """Beat until cancelled; after the server was away, look around first."""
        self._last = self._clock()
        while True:
            await trio.sleep(BEAT)
            if self.is_late:
                await self._look_around()
            self._last = self._clock()
