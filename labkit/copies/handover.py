"""Handing over: an expert moves to another server while it is called, and no update is lost and no call fails.

The server that gives it 1. copies it, while it goes on serving; 2. lets requests wait, and copies what has changed
since; 3. asks the other one to take it. That one serves it from then on, in the next epoch, and declares it; only then
it answers. 4. Those whose requests have waited are told where the expert is, and ask there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from labkit.contact import Contact
from labkit.copies.copying import Copying
from labkit.copies.experts import ServedExperts
from labkit.copies.meeting import Meeting
from labkit.copies.messages import TAKE, CopyState, Take, Taken
from labkit.copies.servers import GridServers
from labkit.copies.store import CopyStore
from labkit.directory import Directory
from labkit.directory.index import Declared
from labkit.errors import (
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    LabkitError,
    Overloaded,
    RequestRefused,
    RPCError,
)
from labkit.events import Emit, ExpertHandedOver
from labkit.wire.rpc_types import Caller, Reply, Request

logger = logging.getLogger(__name__)

TAKE_TIME = 5.0  # seconds that the other server has to serve and declare an expert, and 1 s more for each 100 MB
BYTES_PER_SECOND = 100e6


@dataclass(eq=False)
class HandOver:
    """Gives experts to other servers, and takes those that are given.

    Args:
        caller: Makes the calls.
        directory: Where experts are declared.
        copying: Makes copies.
        store: The copies that are kept here.
        experts: The experts that are served here.
        servers: The servers of the grid.
        meeting: Settles who has an expert if an answer is lost.
        own: Returns our own contact.
        emit: Gets an `ExpertHandedOver` for each expert that is given.
        refuse: Returns why no expert is taken now; empty if one may be.
        on_taken: Called with each expert that is taken, who gave it, and the epoch.
    """

    caller: Caller
    directory: Directory
    copying: Copying
    store: CopyStore
    experts: ServedExperts
    servers: GridServers
    meeting: Meeting
    own: Callable[[], Contact]
    emit: Emit
    refuse: Callable[[], str]
    on_taken: Callable[[str, Contact, int], object] = lambda uid, before, epoch: None
    _giving: dict[str, trio.Lock] = field(default_factory=dict, init=False)  # one at a time gives an expert

    async def give(self, uid: str, to: Contact, *, load: int | None = None, patience: float = 0.0) -> bool:
        """Give an expert to another server.

        Args:
            uid: The expert.
            to: The server.
            load: How many experts are served here, if the other one is to take it only if it has less by two.
            patience: Seconds to try again while it takes as many copies as it can.

        Returns:
            Whether the other one has it now.
        """
        lock = self._giving.setdefault(uid, trio.Lock())
        try:
            async with lock:
                with self.copying.paused(uid):
                    return uid in self.experts.held and await self._give(uid, to, load, patience)
        finally:
            if not lock.statistics().tasks_waiting:
                self._giving.pop(uid, None)

    async def _give(self, uid: str, to: Contact, load: int | None, patience: float) -> bool:
        experts = self.experts
        if load is not None and experts.is_kept(uid):
            return False
        try:
            copied = await self.copying.copy_to(uid, to, in_haste=True, patience=patience)  # 1
        except RPCError as error:
            logger.debug("%s is not given to %s: %s", uid, to.endpoint, error)
            if isinstance(error, (ConnectionLost, DeadlineExceeded)):
                self.servers.lose(to)
            return False
        given = False
        if load is not None and experts.is_kept(uid):
            return False
        self.meeting.giving.add(uid)
        try:
            await experts.hold(uid)  # 2
            if uid not in experts.held:
                return False
            epoch = experts.held[uid]
            if experts.updates(uid) != copied.updates:
                copied = await self.copying.copy_to(uid, to, in_haste=True, patience=patience)
            timeout = TAKE_TIME + copied.size / BYTES_PER_SECOND
            body = Take(CopyState(uid, epoch, copied.updates), load)
            reply = await self.caller.call(to, TAKE, body, returns=Taken, timeout=timeout)  # 3
            given = True
            experts.give_up(uid, to, reply.body.epoch)  # 4
            self.servers.note(to, reply.body.experts)
            self.copying.forget(uid)
            self.emit(ExpertHandedOver(uid=uid, address=self.own().endpoint, to=to.endpoint, epoch=reply.body.epoch))
        except RPCError as error:
            logger.debug("%s is not given to %s: %s", uid, to.endpoint, error)
            if load is not None and isinstance(error, RequestRefused):
                self.servers.note(to, load - 1)  # others have given it some meanwhile
            if not isinstance(error, (RequestRefused, Overloaded, ConnectionLost)) and uid in experts.held:
                given = await self._has_taken(uid, to, epoch)  # the answer may have been lost
        finally:
            self.meeting.giving.discard(uid)
            if not given:
                experts.release(uid)
                self.meeting.suspect(uid, to)  # it may have it all the same
        return given

    async def _has_taken(self, uid: str, to: Contact, epoch: int) -> bool:
        """Look whether an expert is declared elsewhere by now; then it is given up here."""
        try:
            info = (await self.directory.holders([uid])).get(uid)
        except LabkitError:
            return False
        if info is None or info.epoch <= epoch or info.contact.key == self.own().key:
            return False
        self.experts.give_up(uid, info.contact, info.epoch)
        self.copying.forget(uid)
        return True

    async def rpc_take(self, request: Request) -> Reply:
        """Serve an expert from now on, of which a copy is kept here, as its server asks."""
        body: Take = request.body
        wanted = body.copy
        copy = self.store.copies.get(wanted.uid)
        if copy is None or (copy.epoch, copy.updates) != (wanted.epoch, wanted.updates):
            raise BadRequest(f"there is no such copy of {wanted.uid} here")
        if request.peer.key not in (None, copy.primary.key):
            raise RequestRefused("only the server of an expert gives it away")
        if why := self.refuse():
            raise RequestRefused(why)
        if body.load is not None and len(self.experts.held) + 2 > body.load:
            raise RequestRefused("as many experts are served here by now")
        epoch = copy.epoch + 1
        try:
            await self.experts.adopt(copy.uid, copy.path, copy.head.backend, epoch)
        except RPCError:
            raise
        except LabkitError as error:
            raise RequestRefused(f"{copy.uid} cannot be served here: {error}") from None
        self.meeting.was_given(copy.primary, copy.uid, copy.updates)  # should it not get our answer
        self.on_taken(copy.uid, copy.primary, epoch)
        with trio.CancelScope(shield=True), trio.move_on_after(TAKE_TIME):
            try:
                await self.directory.declare({copy.uid: Declared(epoch)}, self.own())
            except LabkitError as error:  # it is declared again with all that is served here
                logger.warning("%s", error)
        await self.store.remove(copy.uid)
        return Reply(Taken(epoch, len(self.experts.held)))
