"""Watching the servers whose experts are copied here: who is gone is noticed within seconds, and nobody else.

Each server is always being called: it keeps its answer back, for up to two seconds. So a connection that breaks is
noticed at once, and one call in two seconds is enough. A server is gone if two connections in a row break or are
refused, or if it neither answers in time nor, asked once more, at once, unless another server reaches it. Calls are
counted, not seconds: a machine that was asleep itself wakes up with many seconds gone and has missed one call. And who
reaches nobody else either takes nobody for gone: it is cut off itself.

The calls tell both sides what they have to know: the server, which copies are kept here, and how fresh they are; this
side, how far the experts have come since. A server that is behind a copy of its own was restarted, and has begun anew:
its expert is carried on from the copy, as if it were gone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from labkit.contact import Contact
from labkit.copies.messages import MAX_WATCHED, PROBE, WATCH, CopyState, Watched, WatchedExpert, WatchReply
from labkit.copies.store import Copy
from labkit.dht.protocol import Ping, Pong
from labkit.errors import ConnectionLost, DeadlineExceeded, RPCError, WrongServerKey
from labkit.wire.rpc_types import Caller

logger = logging.getLogger(__name__)

PERIOD = 1.0  # seconds between the beginnings of two calls to a server, at least
HOLD = 2.0  # seconds for which it may keep its answer back
CALL_TIME = 1.0  # seconds in which it has to answer beyond that
LAST_CALL_TIME = 1.5  # the same for the call that is made while others are asked whether they reach it
BROKEN_CALLS = 2  # in a row: connections that broke, or were refused
SILENT_CALLS = 1  # in a row that were not answered in time, before others are asked
RETRY_PAUSE = 0.2  # seconds between two calls over connections that break
WITNESSES = 8  # other nodes that are asked whether they reach it; some of them may have gone at the same moment
ENOUGH = 2  # of them that do not reach it either


@dataclass(slots=True)
class Known:
    """What is known of an expert that is copied here.

    Args:
        at: The server that serves it.
        epoch: In which epoch it does.
        updates: How far it has come, when that server was last heard.
        anew: Whether it has begun anew there, so that what it has learnt is not in the copy, nor the other way round.
    """

    at: Contact
    epoch: int
    updates: int
    anew: bool = False


class Copies(Protocol):
    """The copies that are kept here: `store.CopyStore`."""

    @property
    def copies(self) -> Mapping[str, Copy]: ...

    async def remove(self, uid: str) -> None: ...


OnGone = Callable[[Contact, Sequence[str], float], Awaitable[object]]  # who, its experts, and when it was heard last


class Watching:
    """Watches the servers of all experts that are copied here.

    Args:
        caller: Makes the calls.
        store: The copies.
        own: Returns our own contact.
        others: Returns other nodes, which are asked whether they reach a server that we do not.
        on_gone: Called when a server is gone, or holds experts no more; until it returns, that server is not watched.

    Attributes:
        known: What is known of the experts, by uid.
    """

    def __init__(
        self, caller: Caller, store: Copies, own: Callable[[], Contact], others: Callable[[], Iterable[Contact]],
        on_gone: OnGone,
    ) -> None:  # fmt: skip
        self.known: dict[str, Known] = {}
        self._caller = caller
        self._store = store
        self._own = own
        self._others = others
        self._on_gone = on_gone
        self._copies: Mapping[str, Copy] = {}  # when it was looked last for servers to watch
        self._watched: set[Contact] = set()
        self._held_back: dict[Contact, trio.CancelScope] = {}  # calls whose answer may be kept back
        self._changed = trio.Event()

    def look(self) -> None:
        """Look for servers to watch: to be called when other copies are kept."""
        self._changed.set()

    def follow(self, uid: str, at: Contact, epoch: int) -> None:
        """Note that another server serves an expert by now, and watch that one: it is asked soon how far that is."""
        self.known[uid] = Known(at, epoch, self.known[uid].updates if uid in self.known else 0)
        if at in self._held_back:
            self._held_back[at].cancel()
        self.look()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for contact in self._servers() - self._watched:
                    self._watched.add(contact)
                    nursery.start_soon(self._watch, contact)
                self._changed = trio.Event()
                await self._changed.wait()

    def _servers(self) -> set[Contact]:
        copies = self._store.copies
        for uid in self.known.keys() - copies.keys():
            del self.known[uid]
        for uid, copy in copies.items():
            known, before = self.known.get(uid), self._copies.get(uid)
            moved = known is not None and known.at != copy.primary and copy is not before  # and it has sent this one
            if known is None or known.epoch < copy.epoch or (known.epoch == copy.epoch and moved):
                self.known[uid] = Known(copy.primary, copy.epoch, copy.updates)
        self._copies = dict(copies)
        return {known.at for known in self.known.values()}

    def _uids_of(self, contact: Contact) -> list[str]:
        copies = self._store.copies
        return sorted(uid for uid, known in self.known.items() if known.at == contact and uid in copies)

    async def _watch(self, contact: Contact) -> None:
        """Watch one server, for as long as experts of it are copied here."""
        try:
            broken = silent = 0
            heard, hurry = trio.current_time(), False
            while uids := self._uids_of(contact):
                began, hold = trio.current_time(), 0.0 if silent or hurry else HOLD
                try:
                    with trio.CancelScope() as asking:
                        if hold:
                            self._held_back[contact] = asking
                        left = await self._ask(contact, uids, hold)
                except (ConnectionLost, WrongServerKey):
                    broken += 1
                except DeadlineExceeded:
                    broken, silent = 0, silent + 1
                except RPCError as error:  # it is there, and says so
                    logger.debug("%s, which is watched, says: %s", contact.endpoint, error)
                    broken, silent, heard = 0, 0, trio.current_time()
                else:
                    if not asking.cancelled_caught:
                        broken, silent, heard = 0, 0, trio.current_time()
                        if left:  # it is there, but does not serve them any more
                            await self._on_gone(contact, left, heard)
                self._held_back.pop(contact, None)
                hurry = asking.cancelled_caught  # it serves more than it was asked for
                if (broken >= BROKEN_CALLS or silent >= SILENT_CALLS) and await self._is_gone(contact):
                    await self._on_gone(contact, self._uids_of(contact), heard)
                    broken = silent = 0
                if broken:
                    await trio.sleep(RETRY_PAUSE)
                elif not silent and trio.current_time() < began + PERIOD:
                    await trio.sleep_until(began + PERIOD)
        finally:
            self._watched.discard(contact)
            self._held_back.pop(contact, None)

    async def _ask(self, contact: Contact, uids: Sequence[str], hold: float) -> list[str]:
        """Say what is copied here, and learn how far it has come.

        Returns the experts that it does not serve, or not from what is copied here: that is newer.

        `hold`: seconds for which the server may keep its last answer back.
        """
        left: list[str] = []
        for start in range(0, len(uids), MAX_WATCHED):
            some = [uid for uid in uids[start : start + MAX_WATCHED] if uid in self._store.copies]
            copies = [self._store.copies[uid] for uid in some]
            kept_back = hold if start + MAX_WATCHED >= len(uids) else 0.0
            states = [CopyState(copy.uid, copy.epoch, copy.updates) for copy in copies]
            body = Watched(self._own(), states, kept_back)
            reply = await self._caller.call(contact, WATCH, body, returns=WatchReply, timeout=kept_back + CALL_TIME)
            for uid, sent, said in zip(some, states, reply.body.experts, strict=False):
                if said is None or said.moved is not None:
                    if uid not in self.known or not self._follow_moved(uid, said):
                        left.append(uid)
                elif said.drop:
                    await self._store.remove(uid)
                elif uid in self.known:
                    anew = (said.epoch, said.updates) < (sent.epoch, sent.updates)
                    self.known[uid] = Known(contact, max(said.epoch, self.known[uid].epoch), said.updates, anew)
                    if anew:  # it was restarted, and found no copy, or an older one
                        left.append(uid)
        return left

    def _follow_moved(self, uid: str, said: WatchedExpert | None) -> bool:
        """Watch the server to which an expert was given. Returns whether that is said, and news."""
        to = None if said is None else said.moved
        if said is None or to is None or said.epoch <= self.known[uid].epoch or not to.is_safe:
            return False
        if to.key == self._own().key:
            return False
        self.follow(uid, to, said.epoch)
        return True

    async def _is_gone(self, contact: Contact) -> bool:
        """Whether others say so, too: at least one has to be there, if there are any, and none may reach it."""
        others = [other for other in self._others() if other.key not in (contact.key, self._own().key)]
        if not others:
            return not await reaches(self._caller, contact, LAST_CALL_TIME)
        heard, reached, tried = 0, False, False

        def settle() -> None:
            if reached or (heard >= ENOUGH and tried):
                nursery.cancel_scope.cancel()

        async def ask(other: Contact) -> None:
            nonlocal heard, reached
            try:
                reply = await self._caller.call(other, PROBE, contact, returns=bool, timeout=2 * CALL_TIME)
                reached = reached or reply.body
            except (ConnectionLost, DeadlineExceeded):
                return
            except RPCError:
                pass  # it is there, but cannot tell
            heard += 1
            settle()

        async def try_again() -> None:  # at the same time, since we may have been cut off until now
            nonlocal reached, tried
            reached = await reaches(self._caller, contact, LAST_CALL_TIME) or reached
            tried = True
            settle()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_again)
            for other in random.sample(others, min(WITNESSES, len(others))):
                nursery.start_soon(ask, other)
        if not heard:
            logger.info("%s does not answer, but nobody else does either: we are cut off", contact.endpoint)
        return heard > 0 and not reached


async def reaches(caller: Caller, contact: Contact, timeout: float = CALL_TIME) -> bool:
    """Whether a server that somebody else does not reach answers us."""
    try:
        reply = await caller.call(contact, "dht.ping", Ping(None), returns=Pong, timeout=timeout)
        return bool(reply.body.key == contact.key)
    except (ConnectionLost, DeadlineExceeded):
        return False
    except RPCError:
        return True
