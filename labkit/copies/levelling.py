"""Levelling: servers that came without experts of their own, or back when others had theirs, are given some.

About every second a server looks for a spare one that serves at least two experts less, and hands it one; the less
probably, the nearer it is to the mean, so that a hundred servers do not all offer one to the same spare server. So
loads become even, one expert at a time, and nothing is given back and forth.
"""

from __future__ import annotations

import random

import trio

from labkit.copies.experts import ServedExperts
from labkit.copies.handover import HandOver
from labkit.copies.placement import score
from labkit.copies.servers import GridServers, ServerRecord

PERIOD = 1.0  # seconds until an expert is given away, on average
LEAST_DIFFERENCE = 2  # experts


class Levelling:
    """Gives experts of one server to spare ones that have fewer.

    Args:
        servers: The servers of the grid.
        experts: The experts that are served here.
        handover: Gives them.
    """

    def __init__(self, servers: GridServers, experts: ServedExperts, handover: HandOver) -> None:
        self._servers = servers
        self._experts = experts
        self._handover = handover

    async def run(self) -> None:
        """Level until cancelled."""
        while True:
            while self._emptiest() is None:
                await self._servers.wait_for_round()
            await trio.sleep(PERIOD * random.uniform(0.5, 1.5))
            to = self._emptiest()
            if to is None or random.random() > self._chance():
                continue
            uid = self._best_for(to)
            if await self._handover.give(uid, to.contact, load=len(self._experts.held)):
                self._servers.refresh()

    def _emptiest(self) -> ServerRecord | None:
        """Returns the spare server that is to be given an expert now, if there is one."""
        spares = [record for record in self._servers.others.values() if record.spare and record.room > 0]
        if not spares:
            return None
        fewest = min(record.experts for record in spares)
        if len(self._experts.held) - fewest < LEAST_DIFFERENCE:
            return None
        return random.choice([record for record in spares if record.experts == fewest])

    def _chance(self) -> float:
        """Returns how probably an expert is given: in all, as many as servers have more than the mean."""
        loads = [len(self._experts.held), *(record.experts for record in self._servers.others.values())]
        return max(loads[0] - sum(loads) / len(loads), 1 / len(loads))

    def _best_for(self, to: ServerRecord) -> str:
        """Returns the expert whose copies belong at that server more than those of the others."""
        return min(self._experts.held, key=lambda uid: (score(uid, to.contact.key), uid))
