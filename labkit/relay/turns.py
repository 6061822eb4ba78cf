"""Fair turns: who passes bytes next, where many want to.

Each client of a relay gets the same share of what the relay can do, if it wants it, however many connections it has.
`FairTurns` is start-time fair queueing (Goyal, Vin & Cheng, 1996): a chunk's tag is the virtual time at which its
client had the chunk before it through, and chunks go in the order of their tags. While nobody waits, a turn costs
nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math

import trio

QUANTUM = 1 << 17  # bytes that go through before other tasks of the process have a turn
LEAST_COST = 1 << 12  # bytes that a chunk counts as at least, since small ones take time, too
BURST = 0.05  # seconds: with a rate, what was not used of it is kept for as long
_Waiting = tuple[float, int, int, trio.lowlevel.Task]  # tag, number, cost, task


class Share:
    """One client's share of the turns."""

    __slots__ = ("_turns", "finish")

    def __init__(self, turns: FairTurns) -> None:
        self.finish = 0.0  # virtual time at which all that it has asked for is through
        self._turns = turns

    async def turn(self, size: int) -> None:
        """Wait for the turn of `size` bytes."""
        await self._turns.wait(self, size)


class FairTurns:
    """Hands out turns while `run` runs.

    Args:
        bytes_per_s: How much may pass in a second, all clients together; by default as much as goes.
    """

    def __init__(self, bytes_per_s: float = math.inf) -> None:
        self._rate = bytes_per_s
        self._room = self._most = min(QUANTUM, bytes_per_s * BURST)  # bytes that may pass before the next step
        self._virtual = 0.0
        self._waiting: list[_Waiting] = []  # a heap
        self._numbers = itertools.count()
        self._used = trio.Event()

    def share(self) -> Share:
        """Returns the share of a new client."""
        return Share(self)

    async def wait(self, share: Share, size: int) -> None:
        """Wait for the turn of `size` bytes of this client. `run` must be running."""
        cost = max(size, LEAST_COST) if self._rate == math.inf else size
        tag = max(self._virtual, share.finish)
        share.finish = tag + cost
        if self._room > 0 and not self._waiting:
            self._room -= cost
            self._virtual = tag
            if self._room <= 0 or self._rate < math.inf:  # else `run` has nothing to do, which small calls feel
                self._used.set()
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        self._used.set()
        entry = (tag, next(self._numbers), cost, trio.lowlevel.current_task())
        heapq.heappush(self._waiting, entry)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def run(self) -> None:
        """Hand out turns until cancelled."""
        while True:
            await self._used.wait()
            if self._rate == math.inf:
                await trio.lowlevel.checkpoint()
                self._room = self._most
            else:
                before = trio.current_time()
                await trio.sleep(min(BURST, max(0.001, (1 - self._room) / self._rate)))
                self._room = min(self._most, self._room + (trio.current_time() - before) * self._rate)
            while self._waiting and self._room > 0:
                tag, _, cost, task = heapq.heappop(self._waiting)
                self._room -= cost
                self._virtual = max(self._virtual, tag)
                trio.lowlevel.reschedule(task)
            if not self._waiting and self._room == self._most:
                self._used = trio.Event()
