"""What one server does so that experts outlive their servers: it copies its own, and carries on those of others.

`server.server` runs a `CopyKeeper` beside each server. On a batch's way it lies nowhere: calls to experts go past it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import trio

from labkit.contact import Contact
from labkit.copies.copying import Copying
from labkit.copies.experts import ServedExperts
from labkit.copies.handover import HandOver
from labkit.copies.leftovers import Leftover, Leftovers
from labkit.copies.levelling import Levelling
from labkit.copies.meeting import Meeting
from labkit.copies.messages import (
    HAVE,
    MAX_WATCHED,
    MEET,
    PROBE,
    TAKE,
    WATCH,
    CopyHead,
    CopyState,
    Meet,
    Take,
    Watched,
)
from labkit.copies.placement import rank
from labkit.copies.receiving import CopyReceiver
from labkit.copies.returning import Carried, carried_by_others
from labkit.copies.sending import CopyBudget
from labkit.copies.servers import KEY_PREFIX, GridServers, ServerRecord
from labkit.copies.store import CopyStore
from labkit.copies.takeover import TakeOver
from labkit.copies.watching import Watching, reaches
from labkit.dht.node import DHTNode
from labkit.directory import Directory
from labkit.errors import LabkitError
from labkit.events import Emit
from labkit.expert_uid import split_uid
from labkit.wire.rpc_types import AsyncMethod, CallbackMethod, Caller, Methods, Reply, Request, RespondFn, SyncMethod

logger = logging.getLogger(__name__)

ROOM = 1 << 16  # experts that a server keeps copies of, or takes
GIVE_PATIENCE = 3.0  # seconds to try again while a server takes as many copies as it can
JUST_NOW = 0.1  # seconds
GIVE_ATTEMPTS = 3  # to find a server that takes an expert, at a clean stop
GIVE_PAUSE = 0.2  # seconds between two of them
GIVE_AT_ONCE = 2  # experts that are handed over at the same time at a clean stop


class CopyKeeper:
    """Copies, watches, takes over and hands over, for one server.

    Args:
        caller: Makes the calls.
        dht: The server's own: there servers find each other.
        directory: There experts are declared.
        experts: The server's experts.
        grid: The name of their grid.
        kind: Of the experts.
        backups: How many copies each of them is to have.
        is_spare: Returns whether the server takes experts from fuller ones now.
        folder: Where copies are kept.
        own: Returns the server's contact.
        emit: Gets the events.
        on_taken: Called with each expert that another server gives to this one, with that server, and the epoch.
        in_thread: Whether files are written in threads; not in virtual time.
        budget: Of bytes; by default as usual.
    """

    def __init__(
        self, caller: Caller, dht: DHTNode, directory: Directory, experts: ServedExperts, *, grid: str, kind: str,
        backups: int, is_spare: Callable[[], bool], folder: Path, own: Callable[[], Contact], emit: Emit,
        on_taken: Callable[[str, Contact, int], object], in_thread: bool = True, budget: CopyBudget | None = None,
    ) -> None:  # fmt: skip
        self.backups = backups
        self._is_spare = is_spare
        self.leaving = False
        self._caller = caller
        self._dht = dht
        self._directory = directory
        self._experts = experts
        self._grid = grid
        self._kind = kind
        self._own = own
        self.store = CopyStore(folder, in_thread=in_thread, durable=in_thread, on_change=lambda: self._watching.look())
        self.servers = GridServers(dht, grid, self._record, sign=directory.sign)
        directory.also = self.servers.entries
        self.copying = Copying(
            caller, experts, self.servers, own, backups, emit, budget=CopyBudget() if budget is None else budget
        )
        self.receiver = CopyReceiver(self.store, check=experts.check, refuse=self._refuse_copy, encrypts=own().secure)
        self.meeting = Meeting(caller, directory, experts, own, emit, dht.come_back, self._keep)
        self._takeover = TakeOver(
            caller, directory, self.servers, self.store, experts, self.meeting, own, emit, self.copying.look
        )
        self._handover = HandOver(
            caller,
            directory,
            self.copying,
            self.store,
            experts,
            self.servers,
            self.meeting,
            own,
            emit,
            self._refuse_expert,
            on_taken,
        )
        self._watching = Watching(caller, self.store, own, self._witnesses, self._on_gone)
        self._leftovers = Leftovers(self.store, experts, self._watching, experts.check)
        self._levelling = Levelling(self.servers, experts, self._handover)

    @property
    def methods(self) -> Methods:
        """The methods that the server answers, by name."""
        uids = Sequence[str]
        return {
            **self.receiver.methods,
            WATCH: CallbackMethod(self._rpc_watch, Watched),
            PROBE: AsyncMethod(self._rpc_probe, Contact),
            HAVE: SyncMethod(self._rpc_have, uids),
            TAKE: AsyncMethod(self._rpc_take, Take),
            MEET: SyncMethod(self.meeting.rpc_meet, Meet),
        }

    @property
    def kept(self) -> int:
        """Copies that are kept here, without those in reserve."""
        return sum(not copy.head.reserve for copy in self.store.copies.values())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do it all until cancelled. Ready when the other servers were looked for once."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.servers.run)
            await nursery.start(self.receiver.run)
            nursery.start_soon(self._watching.run)
            nursery.start_soon(self.copying.run)
            nursery.start_soon(self._levelling.run)
            nursery.start_soon(self.meeting.run)
            nursery.start_soon(self._leftovers.run)
            task_status.started()

    async def carried_by_others(self, uids: Iterable[str]) -> Carried:
        """What others have of experts that are not served here: see `returning`. Raises `LabkitError`."""
        return await carried_by_others(self._caller, self._directory, self.servers, self._own, uids)

    async def leave(self) -> None:
        """Hand all experts over to other servers, as far as there are any, and let nothing be given here any more."""
        self.leaving = True
        try:
            await self.servers.leave()
            await self.servers.read()
        except LabkitError as error:
            logger.debug("%s", error)
        limiter = trio.CapacityLimiter(GIVE_AT_ONCE)

        async def give(uid: str) -> None:
            async with limiter:
                for _ in range(GIVE_ATTEMPTS):
                    for record in self._heirs(uid):
                        given = await self._handover.give(uid, record.contact, patience=GIVE_PATIENCE)
                        if given or uid not in self._experts.held:
                            return
                    await trio.sleep(GIVE_PAUSE)

        async with trio.open_nursery() as nursery:
            for uid in list(self._experts.held):
                nursery.start_soon(give, uid)

    def _heirs(self, uid: str) -> list[ServerRecord]:
        """Returns the servers that an expert may be given to: those that have a copy first, then by their rank."""
        have = self.copying.keys(uid)
        some = rank(uid, self.servers.others.values(), self._own(), have)
        able = [record for record in some if record.room > 0 or record.contact.key[:KEY_PREFIX] in have]
        return sorted(able, key=lambda record: record.contact.key[:KEY_PREFIX] not in have)

    # ------------------------------------------------------------ what others ask

    def _record(self) -> ServerRecord:
        room = 0 if self.leaving else ROOM
        return ServerRecord(
            self._own(),
            len(self._experts.held),
            len(self.store.copies),
            room,
            self._kind[:1000],
            spare=self._is_spare(),
        )

    def _refuse_copy(self, head: CopyHead) -> str:
        name, _ = split_uid(head.uid)
        if self.leaving:
            return "this server is about to stop"
        if name != self._grid:
            return f"this server keeps copies of the grid {self._grid!r}"
        if head.size > (largest := self._experts.largest_copy):
            return f"a copy has at most {largest / 1e6:.1f} MB here, and this one has {head.size / 1e6:.1f} MB"
        epoch = self._experts.held.get(head.uid)
        if epoch is not None:
            self.meeting.suspect(head.uid, head.primary)  # both of us serve it
            return f"{head.uid} is served here, too, in epoch {epoch}"
        return ""

    def _refuse_expert(self) -> str:
        return "this server is about to stop" if self.leaving else ""

    def _rpc_watch(self, request: Request, respond: RespondFn) -> Callable[[], object]:
        """Answer who keeps copies of our experts. One that has a copy of a higher epoch knows another primary."""
        body: Watched = request.body
        for state in body.copies:
            if state.epoch > self._experts.held.get(state.uid, state.epoch):
                self.meeting.suspect(state.uid)
        return self.copying.rpc_watch(request, respond)

    async def _rpc_take(self, request: Request) -> Reply:
        """Serve an expert from now on, and copy it soon."""
        reply = await self._handover.rpc_take(request)
        self.copying.look()
        return reply

    async def _rpc_probe(self, request: Request) -> Reply:
        """Whether a server answers us that another one does not reach. Only servers of the grid are called."""
        contact: Contact = request.body
        known = self.servers.others.get(contact.key)
        return Reply(known is not None and await reaches(self._caller, known.contact))

    def _rpc_have(self, request: Request) -> Reply:
        """Which copies of these experts are kept here, and which of them are served."""
        return Reply([self._have(uid) for uid in request.body[:MAX_WATCHED]])

    def _have(self, uid: str) -> CopyState | None:
        epoch, copy = self._experts.held.get(uid), self.store.copies.get(uid)
        if epoch is not None:
            return CopyState(uid, epoch, self._experts.updates(uid), served=True)
        return None if copy is None else CopyState(uid, copy.epoch, copy.updates)

    # ------------------------------------------------------------ what is done for others

    def _witnesses(self) -> Iterable[Contact]:
        servers = [record.contact for record in self.servers.others.values()]
        keys = {contact.key for contact in servers}
        return [*servers, *(contact for contact in self._dht.routing if contact.key not in keys)]

    def _keep(self, one: Leftover) -> None:
        if not self.leaving:
            self._leftovers.keep(one)

    async def look_around(self) -> None:
        """Find out which experts are still ours, after this server was away: from who has copies, and the DHT."""
        suspects: dict[str, Contact | None] = dict.fromkeys(self._experts.held)
        at: dict[Contact, set[str]] = {}
        for uid in suspects:
            for contact in self.copying.holders(uid):
                at.setdefault(contact, set()).add(uid)
        logger.warning("%s was away, and asks what is still its own", self._own().endpoint)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.meeting.meet_all, at)
            nursery.start_soon(self.meeting.look, suspects)

    async def _on_gone(self, gone: Contact, uids: Sequence[str], heard: float) -> None:
        if self.leaving:
            return
        if heard < trio.current_time() - JUST_NOW:  # else it is there, and does not serve them any more
            self.copying.lose(gone)
            self._dht.suspect(gone)
        try:
            elsewhere = await self._takeover.claim(gone, uids, heard, dict(self._watching.known))
        except LabkitError as error:  # it is found gone again
            logger.warning("the experts of %s could not be taken over now: %s", gone.endpoint, error)
            return
        for uid, info in elsewhere.items():
            self._watching.follow(uid, info.contact, info.epoch)
        self.servers.refresh()
