"""Levelling: servers that came without experts of their own, or back when others had theirs, are given some.

Every few seconds a server looks for a spare one that serves at least two experts less, and hands it one. So loads
become even, one expert at a time, and nothing is given back and forth.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from labkit.contact import Contact
from labkit.copies.experts import ServedExperts
from labkit.copies.handover import HandOver
from labkit.copies.placement import rank
from labkit.copies.servers import GridServers, ServerRecord

PERIOD = 1.0  # seconds until an expert is given away, on average
LEAST_DIFFERENCE = 2  # experts


class Levelling:
    """Gives experts of one server to spare ones that have fewer.

    Args:
        servers: The servers of the grid.
        experts: The experts that are served here.
        handover: Gives them.
        own: Returns our own contact.
    """

    def __init__(
        self, servers: GridServers, experts: ServedExperts, handover: HandOver, own: Callable[[], Contact]
    ) -> None:
        self._servers = servers
        self._experts = experts
        self._handover = handover
        self._own = own

    async def run(self) -> None:
        """Level until cancelled."""
        while True:
            while self._emptiest() is None:
                await self._servers.wait_for_round()
            await trio.sleep(PERIOD * random.uniform(0.5, 1.5))
            to = self._emptiest()
            if to is None:
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

    def _best_for(self, to: ServerRecord) -> str:
        """Returns the expert whose copies belong at that server, if there is one, else any."""
        others = list(self._servers.others.values())

        def place(uid: str) -> int:
            keys = [record.contact.key for record in rank(uid, others, self._own())]
            return keys.index(to.contact.key) if to.contact.key in keys else len(keys)

        return min(self._experts.held, key=lambda uid: (place(uid), uid))
