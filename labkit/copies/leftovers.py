"""Leftovers: who gives an expert up to another server that serves it, too, keeps its own state as a copy in reserve.

The other one may have copies nowhere, as when both have just met after a division of the network, and be gone in the
next second. This copy is of an older epoch, so that it does not count as one of those that are made of the expert: they
replace it, or it is dropped when they are made (`Copying.rpc_watch`).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

import trio

from labkit.contact import Contact
from labkit.copies.experts import Pack, ServedExperts
from labkit.copies.messages import CopyHead
from labkit.copies.store import Check, CopyStore
from labkit.copies.watching import Watching
from labkit.errors import LabkitError

logger = logging.getLogger(__name__)

PACK_TIME = 30.0  # seconds for the batch that an expert was in, and to take its state


class Leftover(NamedTuple):
    """An expert that was given up.

    Args:
        uid: The expert.
        epoch: In which epoch it was served here, at most.
        to: Who serves it.
        their_epoch: In which epoch.
        pack: Returns its state as it was here.
    """

    uid: str
    epoch: int
    to: Contact
    their_epoch: int
    pack: Pack


class Leftovers:
    """Keeps what was given up, one expert after the other. `run` has to run.

    Args:
        store: There it is kept.
        experts: The experts that are served here.
        watching: Watches who serves them now.
        check: Raises `CheckpointError` for a state that could not be carried on here.
    """

    def __init__(self, store: CopyStore, experts: ServedExperts, watching: Watching, check: Check) -> None:
        self._store = store
        self._experts = experts
        self._watching = watching
        self._check = check
        self._given_up = deque[Leftover]()
        self._wake = trio.Event()

    def keep(self, one: Leftover) -> None:
        """Keep an expert's state soon."""
        self._given_up.append(one)
        self._wake.set()

    async def run(self) -> None:
        """Keep what is given up, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._given_up:
                one = self._given_up.popleft()
                try:
                    await self._keep(one)
                except (LabkitError, OSError, trio.TooSlowError) as error:
                    logger.info("what %s was here is not kept: %r", one.uid, error)

    async def _keep(self, one: Leftover) -> None:
        if not one.to.is_safe:
            return
        with trio.fail_after(PACK_TIME):
            packed = await one.pack()
        if one.uid in self._experts.held or one.uid in self._store.copies:  # it is back, or there is a copy of theirs
            return
        head = CopyHead(
            one.uid, one.epoch, packed.updates, len(packed.data), packed.crc32, packed.kind, dict(packed.backend),
            one.to, reserve=True,
        )  # fmt: skip
        incoming = await self._store.begin(head, packed.data)
        await incoming.finish(self._check)
        self._watching.follow(one.uid, one.to, one.their_epoch)
