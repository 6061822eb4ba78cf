"""Taking over: the servers that hold copies of an expert whose server is gone carry it on, in the next epoch.

Several may hold one. All of them compute the same order: those with a fresher copy come before those with a staler one,
then as the last declaration names them. Whoever is first of those that are there claims the expert: it serves it, and
declares it with an epoch above all that were seen. The others see that, or are told when they ask how fresh its copy
is, and watch the new server. Who has only the copy in reserve waits a little for those that do not answer. Should two
have claimed it at the same moment, they meet at once (`meeting`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec
import trio

from labkit.contact import Contact
from labkit.copies.experts import ServedExperts
from labkit.copies.meeting import Meeting
from labkit.copies.messages import HAVE, MAX_WATCHED, CopyState
from labkit.copies.placement import rank
from labkit.copies.sending import CopyBudget, send_copy
from labkit.copies.servers import KEY_PREFIX, GridServers
from labkit.copies.store import Copy, CopyStore
from labkit.copies.watching import BROKEN_CALLS, Known
from labkit.directory import Directory
from labkit.directory.index import Declared
from labkit.errors import CheckpointError, ConnectionLost, LabkitError, RPCError
from labkit.events import CopyFailed, Emit, ExpertTakenOver
from labkit.expert_uid import ExpertInfo
from labkit.wire.rpc_types import Caller

logger = logging.getLogger(__name__)

ASK_TIME = 1.0  # seconds that others who hold a copy have to say how fresh theirs is
TURN_TIME = 1.5  # seconds that whoever comes first has to take an expert over, before the next one does
RESERVE_TIME = 4.0  # the same of who has only the copy in reserve, unless all others have answered
GUESS_TIME = 0.5  # the same of who may hold one, while others are named
GUESSES = 3  # servers that may have a copy, whoever is named, by their rank; or that are offered one
TRY_AGAIN = 5.0  # seconds until an expert is tried again that could not be carried on
LOOK_AGAIN = 0.3  # seconds between two looks whether it has


class TakeOver:
    """Claims experts whose server is gone.

    Args:
        caller: Asks others who hold copies.
        directory: Where experts are declared.
        servers: The servers of the grid.
        store: The copies that are kept here.
        experts: The experts that are served here.
        meeting: Tells the server that is gone, should it come back, and others that claim the same.
        own: Returns our own contact.
        emit: Gets an `ExpertTakenOver` for each expert, or a `CopyFailed` for one that cannot be carried on here.
        on_adopted: Called when there are more experts here, which have no copies yet.
    """

    def __init__(
        self, caller: Caller, directory: Directory, servers: GridServers, store: CopyStore, experts: ServedExperts,
        meeting: Meeting, own: Callable[[], Contact], emit: Emit, on_adopted: Callable[[], object],
    ) -> None:  # fmt: skip
        self._caller = caller
        self._directory = directory
        self._servers = servers
        self._store = store
        self._experts = experts
        self._meeting = meeting
        self._own = own
        self._emit = emit
        self._on_adopted = on_adopted
        self._claiming: set[str] = set()
        self._unable: dict[str, float] = {}  # experts that could not be carried on here, and when to try again

    async def claim(
        self, gone: Contact, uids: Sequence[str], heard: float, known: Mapping[str, Known]
    ) -> dict[str, ExpertInfo]:
        """Take over experts whose server is gone.

        Args:
            gone: The server.
            uids: Its experts that are copied here.
            heard: When it was heard last, on trio's clock.
            known: What was known of each then.

        Returns:
            The experts that another server serves by now, and where. Those that are not among them, and are not served
            here either, are to be tried again.
        """
        started = trio.current_time()
        elsewhere: dict[str, ExpertInfo] = {}
        self._unable = {uid: until for uid, until in self._unable.items() if trio.current_time() < until}
        busy = self._claiming | self._unable.keys() | self._experts.held.keys()
        waiting = [uid for uid in uids if uid not in busy]
        claimed, broken = set(waiting), Counter[Contact]()
        self._claiming |= claimed
        try:
            while waiting:
                declared = await self._directory.holders(waiting)
                elsewhere |= {u: info for u, info in declared.items() if self._is_elsewhere(info, gone, known.get(u))}
                waiting = [uid for uid in waiting if uid not in elsewhere and uid in self._store.copies]
                first, served = await self._turns(waiting, declared, gone, broken)
                elsewhere |= served
                waiting = [uid for uid in waiting if uid not in served]
                waited = trio.current_time() - started
                first = [uid for uid in waiting if uid in first or waited > self._turn_time(uid)]
                await self._carry_on(gone, first, declared, heard, known)
                waiting = [uid for uid in waiting if uid not in first]
                if waiting:
                    await trio.sleep(LOOK_AGAIN)
        finally:
            self._claiming -= claimed
        return elsewhere

    def _is_elsewhere(self, info: ExpertInfo, gone: Contact, known: Known | None) -> bool:
        """Whether a declaration says that another server has the expert, or that its own has moved, or is back."""
        copy = self._store.copies.get(info.uid)
        if info.contact.key == self._own().key:
            return False  # ours is from before; what is served here is not claimed
        if copy is None:
            return True
        epoch = max(copy.epoch, 0 if known is None else known.epoch)
        return info.epoch > epoch or (info.contact != gone and info.epoch >= copy.epoch)

    def _to_ask(self, uid: str, declared: Mapping[str, ExpertInfo], gone: Contact) -> dict[Contact, bool]:
        """Returns the other servers that may have a copy of an expert, and whether they are to be waited for.

        They are those that are named, and those whose place it is, which may not be named yet.
        """
        others = self._servers.others
        named = declared[uid].copies if uid in declared else ()
        some = {record.contact: True for key, record in others.items() if key[:KEY_PREFIX] in named}
        guesses = rank(uid, others.values(), gone)[:GUESSES]
        return {record.contact: not named for record in guesses} | some

    def _turn_time(self, uid: str) -> float:
        """Returns the seconds after which an expert is carried on here, even if it is another one's turn."""
        copy = self._store.copies.get(uid)
        return RESERVE_TIME if copy is not None and copy.head.reserve else TURN_TIME

    async def _turns(
        self, uids: Sequence[str], declared: Mapping[str, ExpertInfo], gone: Contact, broken: Counter[Contact]
    ) -> tuple[list[str], dict[str, ExpertInfo]]:
        """Returns those of these experts of which nobody else comes first, and those that others serve by now.

        `broken`: how often in a row connections to others have broken.
        """
        by_server: dict[Contact, list[str]] = {}
        awaited: dict[Contact, set[str]] = {}  # experts for which that one is waited for
        for uid in uids:
            for contact, wait in self._to_ask(uid, declared, gone).items():
                by_server.setdefault(contact, []).append(uid)
                if wait:
                    awaited.setdefault(contact, set()).add(uid)
        theirs: dict[str, list[tuple[Contact, CopyState]]] = {uid: [] for uid in uids}
        served: dict[str, ExpertInfo] = {}
        silent: set[str] = set()  # experts of which not all have answered

        async def ask(contact: Contact, some: list[str]) -> None:
            timeout = ASK_TIME if contact in awaited else GUESS_TIME
            try:
                reply = await self._caller.call(
                    contact, HAVE, some[:MAX_WATCHED], returns=list[CopyState | None], timeout=timeout
                )
            except RPCError as error:
                broken[contact] = broken[contact] + 1 if isinstance(error, ConnectionLost) else 0
                if broken[contact] < BROKEN_CALLS:  # else it is gone, too
                    silent.update(awaited.get(contact, ()))
                return
            for uid, state in zip(some, reply.body, strict=False):
                copy = self._store.copies.get(uid)
                if state is not None and state.served and copy is not None and state.epoch > copy.epoch:
                    served[uid] = ExpertInfo(uid, contact, epoch=state.epoch)
                elif state is not None and not state.served:
                    theirs[uid].append((contact, state))

        async with trio.open_nursery() as nursery:
            for contact, some in by_server.items():
                nursery.start_soon(ask, contact, some)
        named = {uid: declared[uid].copies if uid in declared else () for uid in uids}
        copies = self._store.copies
        first = [uid for uid in uids if self._is_first(copies.get(uid), theirs[uid], named[uid])]
        first = [uid for uid in first if not (uid in silent and copies[uid].head.reserve)]
        return [uid for uid in first if uid not in served], served

    def _is_first(self, copy: Copy | None, theirs: list[tuple[Contact, CopyState]], named: Sequence[bytes]) -> bool:
        if copy is None:
            return False

        def place(key: bytes, epoch: int, updates: int) -> tuple[int, int, int, bytes]:
            rank = named.index(key[:KEY_PREFIX]) if key[:KEY_PREFIX] in named else len(named)
            return -epoch, -updates, rank, key

        ours = place(self._own().key, copy.epoch, copy.updates)
        return all(ours < place(contact.key, state.epoch, state.updates) for contact, state in theirs)

    async def _carry_on(
        self, gone: Contact, uids: Sequence[str], declared: Mapping[str, ExpertInfo], heard: float,
        known: Mapping[str, Known],
    ) -> None:  # fmt: skip
        """Serve experts from their copies, and declare them."""
        adopted: dict[str, Declared] = {}
        lost: dict[str, int] = {}
        for uid in uids:
            copy = self._store.copies.get(uid)
            if copy is None or uid in self._experts.held:
                continue
            epochs = copy.epoch, declared[uid].epoch if uid in declared else 0, known[uid].epoch if uid in known else 0
            epoch = 1 + max(epochs)
            try:
                await self._experts.adopt(uid, copy.path, copy.head.backend, epoch)
            except LabkitError as error:
                await self._pass_on(copy, gone, error)
                continue
            adopted[uid] = Declared(epoch)
            last = known.get(uid)
            of_ours = 0 if last is not None and last.anew else copy.updates  # of what it had learnt, when heard last
            lost[uid] = 0 if last is None else max(0, last.updates - of_ours)
            reserve = {uid: copy.updates} if copy.head.reserve else {}
            self._meeting.took_over(gone, {uid: of_ours + lost[uid]}, reserve)
        if not adopted:
            return
        self._on_adopted()
        try:
            await self._directory.declare(adopted, self._own())
        except LabkitError as error:  # it is tried again with all that is served here
            logger.warning("%s", error)
        for uid in adopted:
            self._meeting.suspect(uid)  # that another one has claimed it at the same moment
        now = trio.current_time()
        for uid, how in adopted.items():
            await self._store.remove(uid)
            self._emit(
                ExpertTakenOver(
                    uid=uid, address=self._own().endpoint, before=gone.endpoint, epoch=how.epoch,
                    lost_updates=lost[uid], seconds=now - heard,
                )
            )  # fmt: skip
        logger.info("%d experts of %s are served here now, as it is gone", len(adopted), gone.endpoint)

    async def _pass_on(self, copy: Copy, gone: Contact, error: LabkitError) -> None:
        """Give a copy to another server, which then takes the expert over, since it cannot be carried on here."""
        uid = copy.uid
        logger.warning("%s cannot be taken over from %s: %s", uid, gone.endpoint, error)
        cause = error.cause if isinstance(error, RPCError) else "failed"
        self._emit(CopyFailed(uid=uid, address=self._own().endpoint, cause=cause, detail=f"not carried on: {error}"))
        if isinstance(error, CheckpointError):  # it is no use to others either
            await self._store.remove(uid)
            return
        self._unable[uid] = trio.current_time() + TRY_AGAIN
        head = msgspec.structs.replace(copy.head, primary=self._own())
        try:
            data = await self._store.read(uid, lambda _, path: path.read_bytes())
        except (KeyError, OSError) as failure:
            logger.warning("the copy of %s cannot be read: %s", uid, failure)
            return
        for record in rank(uid, self._servers.others.values(), self._own())[:GUESSES]:
            if record.room == 0:
                continue
            try:
                await send_copy(
                    self._caller, record.contact, head, data, CopyBudget(float("inf"), 1.0), emit=self._emit
                )
            except RPCError as failure:
                logger.info("%s does not take it either: %s", record.contact.endpoint, failure)
            else:
                await self._store.remove(uid)  # it watches us, and learns that we do not serve it
                return
