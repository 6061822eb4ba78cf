"""Copying: keeps copies of the experts that are served here at other servers, and knows how fresh they are.

First come the experts without a copy, those that have learnt most before the others, and then those whose copy is
oldest, so that what is promised in seconds holds for each; each at most once in a period, which is shorter where copies
take longer. The state is taken between two batches, as for a checkpoint, and sent in parts under a budget, so that
training goes on beside it.

When there is nothing else to do, one more server gets a copy *in reserve*, once a minute. It is what an expert goes on
from if its server and all backups leave within the seconds that it takes to make other copies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter

import trio

from labkit.contact import Contact
from labkit.copies.backups import QUIET, Backups
from labkit.copies.experts import PackedExpert, ServedExperts
from labkit.copies.made import MadeCopies, MadeCopy
from labkit.copies.messages import CopyHead, CopyState, Watched, WatchedExpert, WatchReply
from labkit.copies.placement import rank
from labkit.copies.sending import CopyBudget, send_copy
from labkit.copies.servers import GridServers, ServerRecord
from labkit.errors import ConnectionLost, DeadlineExceeded, Overloaded, RequestRefused, RPCError
from labkit.events import CopyFailed, Emit, Event
from labkit.wire.rpc_types import Caller, Reply, Request, RespondFn

logger = logging.getLogger(__name__)

PROMISE = 10.0  # seconds of which an expert loses what it has learnt, at most, if copies are not too large for it
PERIOD, SHORTEST_PERIOD = 9.0, 6.0  # seconds between the states of two copies of an expert, at most and at least
RESERVE_PERIOD = 60.0  # the same of one in reserve, at least
FORGETTING = 0.1  # of how long copies take, with each that takes less
LOOK_PERIOD = 0.5  # seconds between two looks for copies that are due, while an expert lacks one, or has nothing new
LOOK_AHEAD = 1.0  # the same while all have copies, unless one is due before
CALM_LOOK_PERIOD = 2.0  # the same while no expert learns
MARGIN = 1.0  # seconds that a copy may wait until it begins
AT_ONCE = 3  # copies that are made at the same time, to different servers, if all are small
SMALL = 1 << 20  # bytes
NAME_PERIOD = 2.0  # seconds between two times that it is said who has copies, while some are made
UNPACKED_PAUSE = 30.0  # seconds after which it is tried again to take the state of an expert that could not be taken
PATIENCE = 5.0  # seconds to try again at a server that takes as many copies as it can


class Copying:
    """Copies the experts of one server.

    Args:
        caller: Makes the calls.
        experts: The experts.
        servers: The servers of the grid.
        own: Returns our own contact.
        backups: How many copies each expert is to have, besides one in reserve if it is to have any.
        emit: Gets a `CopyStored` or `CopyFailed` for each.
        budget: Of bytes, for all copies together.
        period: Seconds between two copies of an expert that learns.
    """

    def __init__(
        self, caller: Caller, experts: ServedExperts, servers: GridServers, own: Callable[[], Contact], backups: int,
        emit: Emit, *, budget: CopyBudget, period: float = PERIOD,
    ) -> None:  # fmt: skip
        self.backups = backups
        self.period = period
        self._caller = caller
        self._experts = experts
        self._backups = Backups(caller, servers)
        self._own = own
        self._emit = emit
        self._budget = budget
        self._at_once = budget.in_haste()
        self._paused: set[str] = set()  # experts that are being given away
        self._under_way: dict[str, tuple[Contact, trio.CancelScope]] = {}  # copies that are made now, by expert
        self._wake = trio.Event()  # set when a copy has ended
        self._watchers: dict[RespondFn, Watched] = {}  # whose answers are kept back while all is served here
        self._answer_at = math.inf  # when they have been kept back for long enough
        self._look_at = 0.0  # when `run` looks again
        self._places: dict[tuple[str, tuple[bytes, ...]], list[Contact]] = {}  # what `_targets` has found
        self._among: object = None  # for which address of ours, among which servers, and which of them have room
        self._seen: object = None  # our address, and what the servers said, when that was looked at last
        self._made = MadeCopies(experts.held)
        self._reserve_at: dict[str, float] = {}  # when one in reserve is tried again that could not be made
        self._unpacked: dict[str, float] = {}  # experts whose state could not be taken: left alone until then
        self._takes = 0.0  # seconds that a copy takes lately, at worst

    # ------------------------------------------------------------ what there is

    def keys(self, uid: str) -> tuple[bytes, ...]:
        """Returns the first bytes of the keys of the servers that have a copy of an expert: see `MadeCopies.keys`."""
        return self._made.keys(uid)

    def holders(self, uid: str) -> list[Contact]:
        """Returns the servers that had a copy of an expert when they were heard last."""
        return [copy.at for copy in self._made.of(uid).values()]

    def copied_updates(self, uid: str) -> int:
        """Returns how far an expert had come at its freshest copy; 0 without one."""
        return max((copy.updates for copy in self._made.of(uid).values()), default=0)

    def at_risk(self) -> list[str]:
        """Returns the experts that nobody has a copy of, or none that is fresh."""
        if not self.backups:
            return list(self._experts.held)
        return [uid for uid in self._experts.held if not self._made.fresh(uid)]

    @property
    def sent_bytes(self) -> int:
        """Bytes of copies that were sent so far."""
        return self._budget.sent + self._at_once.sent

    @property
    def rate(self) -> float:
        """Bytes a second that copies take at most."""
        return self._budget.rate

    def last_copy(self, uid: str, key: bytes) -> int | None:
        """Returns how far an expert had come at its last copy, at the server with that key or else at any.

        None if there was none in this epoch.
        """
        epoch = self._experts.held.get(uid)
        updates = {at: copy.updates for at, copy in self._made.of(uid).items() if copy.epoch == epoch}
        return updates.get(key, max(updates.values(), default=None))

    def forget(self, uid: str) -> None:
        """Forget the copies of an expert that is served here no more."""
        self._made.forget(uid)
        self._reserve_at.pop(uid, None)
        self._unpacked.pop(uid, None)
        self._answer_watchers()

    def rpc_watch(self, request: Request, respond: RespondFn) -> Callable[[], object]:
        """Answer who keeps copies of our experts: how far they have come, and which copies are needed no more.

        While all of them are served here, and no copy is newer, the answer is kept back for as long as asked.
        """
        body: Watched = request.body
        if request.peer.key not in (None, body.by.key):
            raise RequestRefused("only who keeps copies says so")
        self._made.hear(body.copies, body.by)
        if body.hold and all(self._is_ahead(state) for state in body.copies):
            self._watchers[respond] = body
            self._answer_at = min(self._answer_at, trio.current_time() + body.hold)
            if self._answer_at < self._look_at:
                self._wake.set()
        else:
            respond(self._answer(body))
        return partial(self._watchers.pop, respond, None)

    def _is_ahead(self, state: CopyState) -> bool:
        """Whether an expert is served here, and its copy is from here: else it has begun anew here."""
        epoch = self._experts.held.get(state.uid)
        return epoch is not None and (epoch, self._experts.updates(state.uid)) >= (state.epoch, state.updates)

    def _answer_watchers(self) -> None:
        """Give the answers that are kept back, all of them together, so that they come again together."""
        watchers, self._watchers, self._answer_at = self._watchers, {}, math.inf
        for respond, body in watchers.items():
            respond(self._answer(body))

    def _answer(self, body: Watched) -> Reply:
        """Returns what there is to say of experts that are copied elsewhere."""
        some = self._able()
        rows: list[WatchedExpert | None] = []
        for state in body.copies:
            epoch = self._experts.held.get(state.uid)
            if epoch is None:
                moved = self._experts.moved(state.uid)
                rows.append(None if moved is None else WatchedExpert(moved[1], 0, moved=moved[0]))
            else:
                drop = self._is_ahead(state) and self._is_spare(state.uid, body.by, some)
                rows.append(WatchedExpert(epoch, self._experts.updates(state.uid), drop=drop))
                if drop:
                    self._made.drop(state.uid, body.by.key)
        return Reply(WatchReply(rows))

    def _is_spare(self, uid: str, at: Contact, some: Sequence[ServerRecord]) -> bool:
        """Whether a copy is needed no more, since those whose place it is have one, also that in reserve."""
        whole = self._made.whole(uid)
        wanted = {contact.key for contact in self._targets(uid, whole, some)}
        have = {copy.at.key for copy in whole}
        return at.key not in wanted and len(wanted) >= self.backups and have.issuperset(wanted)

    # ------------------------------------------------------------ making copies

    def look(self) -> None:
        """Look for copies that are due now, as when an expert has come."""
        self._wake.set()

    async def run(self) -> None:
        """Keep copies until cancelled."""
        named_at = learnt_at = trio.current_time()
        states: dict[str, int] = {}
        async with trio.open_nursery() as nursery:
            while True:
                due = self._next() if len(self._under_way) < self._at_once_now() else None
                if not (due or self._under_way) or trio.current_time() - named_at >= NAME_PERIOD:
                    self._name()
                    named_at = trio.current_time()
                if due is not None:
                    uid, to, reserve = due
                    scope = trio.CancelScope()
                    self._under_way[uid] = to, scope
                    nursery.start_soon(self._make, uid, to, reserve, scope)
                    continue
                if quiet := self._backups.quiet(self._made.heard()):
                    for contact in quiet:
                        nursery.start_soon(self._backups.call, contact, self._cancel_copies_to, self.lose)
                    continue  # others may get copies in their place
                before, states = states, {uid: self._experts.updates(uid) for uid in self._experts.held}
                learnt_at = learnt_at if states == before else trio.current_time()
                calm = trio.current_time() - learnt_at >= CALM_LOOK_PERIOD
                if trio.current_time() >= self._answer_at:
                    self._answer_watchers()
                self._wake, self._look_at = trio.Event(), self._time_to_look(calm)
                with trio.move_on_at(self._look_at):
                    await self._wake.wait()

    async def _make(self, uid: str, to: Contact, reserve: bool, scope: trio.CancelScope) -> None:
        """Make a copy, which is under way."""
        try:
            with scope:
                if not await self._backups.is_there(to, self._made.heard()):
                    self._backups.pause(to)  # before a copy waits for it, and others for that one
                    return
                await self.copy_to(uid, to, reserve=reserve, patience=0.0 if reserve else PATIENCE)
                self._backups.note_success(to)
        except RPCError as error:
            busy = isinstance(error, Overloaded)  # it takes copies of others now, and will take ours
            if reserve:
                self._reserve_at[uid] = trio.current_time() + (PATIENCE if busy else RESERVE_PERIOD)
            given_away = uid not in self._experts.held
            if not (busy or given_away or self._is_unpacked(uid)):
                logger.info("no copy of %s at %s: %s", uid, to.endpoint, error)
                if not reserve or isinstance(error, (ConnectionLost, DeadlineExceeded)):
                    self._backups.note_failure(to, error)
        finally:
            del self._under_way[uid]
            self._wake.set()

    def _is_unpacked(self, uid: str) -> bool:
        """Whether an expert's state could not be taken just now, which is no fault of who was to get it."""
        return trio.current_time() < self._unpacked.get(uid, 0.0)

    def _period_now(self) -> float:
        """Returns the seconds between two copies of an expert, which are fewer where a copy takes long."""
        return min(self.period, max(SHORTEST_PERIOD, PROMISE - MARGIN - self._takes))

    def _time_to_look(self, calm: bool) -> float:
        """Returns when to look again, unless a copy ends before: `calm` if no expert learns."""
        now, period = trio.current_time(), self._period_now()
        due = [copy.made + period for uid in self._experts.held for copy in self._made.fresh(uid)]
        behind = len(due) < len(self._experts.held) * self.backups or min(due, default=now) <= now
        pause = CALM_LOOK_PERIOD if calm else LOOK_PERIOD if behind else LOOK_AHEAD
        quiet = [heard + QUIET for heard in self._made.heard().values()]
        return min((at for at in (*due, *quiet, self._answer_at) if now < at < now + pause), default=now + pause)

    def _at_once_now(self) -> int:
        return AT_ONCE if 0 < self._made.largest() <= SMALL else 1  # each of them is in memory

    def _name(self) -> None:
        """Let it be declared who has copies."""
        named, at_once = self._made.name()
        self._experts.name_copies(named, at_once=at_once)

    # ------------------------------------------------------------ who keeps copies

    def lose(self, contact: Contact) -> None:
        """Note that a server is gone, and its copies with it: others get some at once."""
        self._backups.lose(contact)
        self._made.lose(contact.key)
        self._cancel_copies_to(contact)
        self._wake.set()

    def _cancel_copies_to(self, contact: Contact) -> None:
        for to, scope in self._under_way.values():
            if to.key == contact.key:
                scope.cancel()

    @contextmanager
    def paused(self, uid: str) -> Iterator[None]:
        """While an expert is given away, it is copied for that alone: of two transfers each would end the other."""
        self._paused.add(uid)
        if uid in self._under_way:
            self._under_way[uid][1].cancel()
        try:
            yield
        finally:
            self._paused.discard(uid)

    def _emit_unless_busy(self, event: Event) -> None:
        if not (isinstance(event, CopyFailed) and event.cause == Overloaded.cause):
            self._emit(event)

    def _able(self) -> list[ServerRecord]:
        """Returns the servers that copies can be given to. When they are others, what `_targets` found is forgotten."""
        own, able = seen = self._own(), self._backups.able()
        if seen != self._seen:  # mostly they are the same objects, so this is quick
            self._seen = seen
            among = own, [(record.contact, record.room > 0) for record in able]
            if among != self._among:  # and not only how many experts each serves
                self._places, self._among = {}, among
        return able

    def _targets(self, uid: str, whole: Sequence[MadeCopy], some: Sequence[ServerRecord]) -> list[Contact]:
        """Returns where copies of an expert belong: at the backups, and then that in reserve.

        `whole`: its copies, as `MadeCopies.whole` returns them; `some`: the servers, as `_able` returns them.
        """
        have = tuple(copy.at.key for copy in whole)
        if (uid, have) not in self._places:
            able = [r for r in rank(uid, some, self._own(), have) if r.room > 0 or r.contact.key in have]
            self._places[uid, have] = [record.contact for record in able[: self.backups + bool(self.backups)]]
        return self._places[uid, have]

    def _next(self) -> tuple[str, Contact, bool] | None:
        """Returns the copy to make next: of which expert, where to, and whether it is the one in reserve."""
        now = trio.current_time()
        some, period = self._able(), self._period_now()
        best: tuple[bool, float, int, str, Contact] | None = None  # backup? seconds of what it has learnt, and updates
        busy = {to.key for to, _ in self._under_way.values()}
        for uid in self._experts.held:
            if uid in self._paused or uid in self._under_way or self._is_unpacked(uid):
                continue
            updates, whole = self._experts.updates(uid), self._made.whole(uid)
            for place, to in enumerate(self._targets(uid, whole, some)):
                backup = place < self.backups
                if to.key in busy or not (backup or now >= self._reserve_at.get(uid, now)):
                    continue
                there = [copy for copy in whole if not (backup and copy.reserve)]
                latest = max(there, key=attrgetter("made"), default=None)
                copied = self._made.of(uid).get(to.key)
                if latest is None:
                    urgency = math.inf, updates
                elif copied is None or copied not in there:
                    urgency = now - latest.made + period, updates - latest.updates
                elif copied.updates == updates or now - copied.made < (period if backup else RESERVE_PERIOD):
                    continue
                else:
                    urgency = now - copied.made, updates - copied.updates
                if best is None or (backup, *urgency) > best[:3]:
                    best = backup, *urgency, uid, to
        if best is None or (self._under_way and not best[0]):
            return None
        return *best[3:], not best[0]

    async def copy_to(
        self, uid: str, to: Contact, *, reserve: bool = False, in_haste: bool = False, patience: float = 0.0
    ) -> MadeCopy:
        """Make a copy of an expert at another server.

        Args:
            uid: The expert.
            to: The server.
            reserve: Whether it is the one in reserve.
            in_haste: Whether to spend no time on the budget, as while requests wait.
            patience: Seconds to try again while the server takes as many copies as it can.

        Raises:
            RPCError: It was not taken; the text says why.
        """
        epoch = self._experts.held.get(uid)
        if epoch is None:
            raise RequestRefused(f"{uid} is not served here any more")
        began = trio.current_time()
        packed = await self._pack(uid)
        size = len(packed.data)
        head = CopyHead(
            uid, epoch, packed.updates, size, packed.crc32, packed.kind, dict(packed.backend), self._own(), reserve
        )
        budget = self._at_once if in_haste else self._budget
        await send_copy(self._caller, to, head, packed.data, budget, patience=patience, emit=self._emit_unless_busy)
        now = trio.current_time()
        if not (in_haste or reserve):
            self._takes = max(now - began, self._takes + FORGETTING * (now - began - self._takes))
        copied = MadeCopy(to, epoch, packed.updates, size, began, now, reserve)
        self._made.note(uid, copied)
        return copied

    async def _pack(self, uid: str) -> PackedExpert:
        try:
            return await self._experts.pack(uid)
        except RPCError as error:
            if uid in self._experts.held:  # else it was given away meanwhile
                self._unpacked[uid] = trio.current_time() + UNPACKED_PAUSE
                self._emit(CopyFailed(uid=uid, address=self._own().endpoint, cause=error.cause, detail=str(error)))
            raise
