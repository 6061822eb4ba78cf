"""Declaring: a server writes in the DHT which experts it serves, again and again, and gives way to others.

No batch passes here. `Directory` is this and the reading side. Of two servers that declare an expert the one with the
higher epoch keeps it; of equal epochs, the one that began first.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import lru_cache

import trio

from labkit.contact import Contact
from labkit.dht.node import Entry
from labkit.directory.cache import DirectoryConfig, PrefixCache, Records
from labkit.directory.declarations import IsAlive, declared, is_senior, known, of_others
from labkit.directory.index import (
    Declarations,
    Declared,
    Sign,
    as_declarations,
    entries_of,
    uid_of,
    withdrawals_of,
)
from labkit.directory.second_look import SecondLook
from labkit.directory.suspicion import BOOT_BITS, Suspicions, make_stamp
from labkit.errors import ExpertsTaken, LabkitError
from labkit.events import Emit, ExpertDeclared, ExpertGivenUp, ignore
from labkit.expert_uid import ExpertInfo

logger = logging.getLogger(__name__)

MAX_SIGNED = 1 << 14  # claims whose signatures are remembered: they are declared again and again
Experts = Collection[str] | Declarations  # uids, perhaps with their epochs and copies


class Declaring:
    """The writing side of a `Directory`.

    Args:
        dht: Stores the records.
        config: Times and bounds.
        emit: Called with the events of declared experts.
        sign: Signs with the key of this node what it claims; without it, its claims are not believed by others.
    """

    def __init__(
        self, dht: Records, config: DirectoryConfig | None = None, emit: Emit = ignore, sign: Sign | None = None
    ) -> None:
        self.sign = sign
        self._sign = None if sign is None else lru_cache(maxsize=MAX_SIGNED)(sign)
        self.config = config or DirectoryConfig()
        self._dht = dht
        self._emit = emit
        self._boot = secrets.randbits(BOOT_BITS)
        self._declarations = 0
        self._since = round(time.time() * 1000)
        self._suspicions = Suspicions(self.config.suspicion)
        self._said: dict[str, Declared] = {}  # what was declared last of each expert
        self._anew = 0  # how often all was to be declared again at once
        self._wake = trio.Event()  # set when something is to be declared at once
        self.also: Callable[[], Sequence[Entry]] = tuple  # returns what is stored whenever all experts are declared
        self._cache = PrefixCache(dht, self.config, self._suspicions)
        self._second_look = SecondLook(self._cache)

    async def declare(
        self, experts: Experts, contact: Contact, *, marked: bool = False, also: Sequence[Entry] = ()
    ) -> set[str]:
        """Declare that experts live at `contact` for the next `ttl` seconds. This is one bulk store.

        Args:
            experts: The experts, perhaps with their epochs and copies.
            contact: The node that holds them.
            marked: Whether the prefixes above them were marked a moment ago, and need not be marked again.
            also: What else is stored with them, in the same calls, if it can be.

        Returns:
            The experts that are declared in a higher epoch already, which stays.

        Raises:
            ValueError: A text is no uid.
            LabkitError: An entry was stored nowhere, not even here.
        """
        self._declarations += 1
        stamp = make_stamp(self._boot, self._declarations)
        entries = entries_of(experts, contact, stamp, self.config.ttl, self._since, self._sign)
        if marked:
            entries = [entry for entry in entries if uid_of(entry) is not None]
        if not entries:
            await trio.lowlevel.checkpoint()
            return set()
        said = as_declarations(experts)
        self._said |= said
        copies = [0] * len(entries)
        with trio.move_on_after(self.config.timeout) as scope:
            copies = await self._dht.store_many([*entries, *also])
        missing = [entry for entry, n in zip(entries, copies, strict=False) if n < 1]
        outranked = set[str]()
        if missing and not scope.cancelled_caught:
            found, withdrawn = await known(self._dht, self.config, filter(None, map(uid_of, missing)))
            ranks = {**withdrawn, **{uid: info.epoch for uid, info in found.items()}}
            outranked = {uid for uid, epoch in ranks.items() if epoch > said[uid].epoch}
            missing = [entry for entry in missing if uid_of(entry) not in outranked]
        for uid in said if missing else outranked:
            self._said.pop(uid, None)
        if missing:
            example = f"{missing[0].key} / {missing[0].subkey}"
            raise LabkitError(
                f"declaring {len(experts)} experts at {contact.endpoint}: {len(missing)} of {len(entries)} entries "
                f"(first: {example}) were stored nowhere within {self.config.timeout:g} s, "
                f"not even at our own DHT node {self._dht.contact.endpoint}; is it running?"
            )
        for uid in experts:
            self._cache.forget_absence(uid)  # what we declare, we find at once
        for uid in experts:
            if uid not in outranked:
                self._emit(ExpertDeclared(uid=uid, address=contact.endpoint, ttl=self.config.ttl))
        return outranked

    async def withdraw(self, experts: Experts, contact: Contact) -> None:
        """Take experts that were declared at `contact` out again, except those that another node has declared since.

        Who has read them before finds them until a cache is refreshed. Raises `LabkitError` if the DHT cannot be asked.
        """
        holders = await declared(self._dht, self.config, experts)
        mine = {uid: info.epoch for uid, info in holders.items() if info.contact.key == contact.key}
        if mine:
            with trio.move_on_after(self.config.timeout):
                await self._dht.store_many(withdrawals_of(mine, self.config.ttl, contact.key, self._sign))

    async def keep_declared(
        self,
        experts: Experts | Callable[[], Experts],
        contact: Contact,
        *,
        is_alive: IsAlive | None = None,
        on_given_up: Callable[[str, ExpertInfo], object] | None = None,
        on_outranked: Callable[[str, int], object] | None = None,
        on_rivals: Callable[[Mapping[str, ExpertInfo]], Awaitable[Collection[str]]] | None = None,
        lost_updates: Callable[[str, ExpertInfo], int] = lambda uid, info: 0,
        is_moving: Callable[[str], bool] = lambda uid: False,
        spare: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Declare every `ttl / 3` seconds until cancelled; ready when the first declaration is stored.

        A declaration that fails after the first is logged and tried again after `ttl / 10`. In between, `declare_news`
        lets those be declared that have come, or are declared with something new.

        Args:
            experts: The experts, perhaps with their epochs and copies, or a function that returns those to declare now.
            contact: The node that holds them. If that is ours and moves, they are declared where it is by then.
            is_alive: With it, each time before they are declared, it is checked that no other node that is alive has
                declared one of them, too, as can happen in a network that was divided. The one of the lower epoch, or
                of one epoch the one that began later, gives the expert up and declares it no more (`ExpertGivenUp`), at
                least in that epoch.
            on_given_up: Called with an expert that is given up, and where it is now.
            on_outranked: Called with an expert and an epoch, from which on it is to be declared: in a lower one it
                was declared, or withdrawn, by a server that is gone, and a lower one would not be believed.
            on_rivals: Awaited with the experts that others have declared, too, except for the first time. It may settle
                with them who has which, and returns those that are settled; the others are given up as above, or kept.
            lost_updates: Returns how many updates of an expert are lost when it is given up, for the event.
            is_moving: Returns whether an expert is about to be handed over: who declares it by then is no rival.
            spare: Whether to go on without any expert, and to give up at the start what has a higher epoch elsewhere.
            task_status: Told when the first declaration is stored.

        Raises:
            LabkitError: The first declaration was stored nowhere; or another node that is alive holds one of the
                experts at the start, in an epoch that is not lower, or all of them later.
        """
        given_up = dict[str, int]()  # the epochs in which others have them
        first, anew, due = True, -1, -math.inf

        def current() -> Declarations:
            said = as_declarations(experts() if callable(experts) else experts)
            return {uid: expert for uid, expert in said.items() if expert.epoch > given_up.get(uid, -1)}

        while True:
            wake = self._wake
            whole = trio.current_time() >= due or anew != self._anew
            anew = self._anew
            if contact.key == self._dht.contact.key:
                contact = self._dht.contact
            now = current() if whole else {u: said for u, said in current().items() if self._is_new(u, said)}
            pause = self.config.ttl / 3
            try:
                if is_alive is not None and now:
                    found, withdrawn = await known(self._dht, self.config, now)
                    others, lost = await of_others(found, contact.key, is_alive)
                    still = current()  # some may have been handed over meanwhile
                    others = {uid: info for uid, info in others.items() if uid in still and not is_moving(uid)}
                    if others and on_rivals is not None and not first:
                        settled = await on_rivals(others)
                        now = {uid: said for uid, said in current().items() if uid in now}
                        others = {uid: info for uid, info in others.items() if uid in now and uid not in settled}
                    rivals = self._rivals(now, others, contact, first, spare, lost_updates)
                    for uid, info in rivals.items():
                        given_up[uid] = info.epoch
                        if on_given_up is not None:
                            on_given_up(uid, info)
                    if rivals and not current() and not spare:
                        raise ExpertsTaken(_taken_text(rivals))
                    if on_outranked is not None:
                        gone = {u: info.epoch for u, info in found.items() if info.contact in lost}
                        for uid, epoch in {**withdrawn, **gone}.items():
                            if uid in now and epoch > now[uid].epoch:
                                on_outranked(uid, epoch + 1)
                said = current()
                self._said = {uid: before for uid, before in self._said.items() if uid in said}
                some = said if whole else self._news(said)
                marked = not any(self._is_new(*one) for one in some.items())
                also = self.also() if whole and some else ()
                outranked = await self.declare(some, contact, marked=marked and not whole, also=also)
                pause = self.config.ttl / (10 if outranked else 3)
            except LabkitError as error:
                if first or isinstance(error, ExpertsTaken):
                    raise
                logger.warning("%s", error)
                pause = self.config.ttl / 10
            if first:
                task_status.started()
            first = False
            due = trio.current_time() + pause if whole else min(due, trio.current_time() + pause)
            with trio.move_on_at(due):
                await wake.wait()

    def declare_anew(self, *uids: str) -> None:
        """Let every `keep_declared` declare its experts at once, as after a move, or only those that are named."""
        for uid in uids:
            self._said.pop(uid, None)
        self._anew += not uids
        self.declare_news()

    def declare_news(self) -> None:
        """Let every `keep_declared` declare at once which experts have come, or what is new of them."""
        self._wake.set()
        self._wake = trio.Event()

    def _news(self, experts: Declarations) -> Declarations:
        """Returns those of which something else was declared last, or nothing."""
        return {uid: said for uid, said in experts.items() if self._said.get(uid) != said}

    def _is_new(self, uid: str, said: Declared) -> bool:
        """Whether an expert has come, or is served in another epoch than was declared."""
        before = self._said.get(uid)
        return before is None or before.epoch != said.epoch

    def _rivals(
        self, experts: Declarations, others: Mapping[str, ExpertInfo], contact: Contact, first: bool, spare: bool,
        lost_updates: Callable[[str, ExpertInfo], int],
    ) -> dict[str, ExpertInfo]:  # fmt: skip
        """Returns the experts that another node keeps, and says so. At the start, raises if there are any."""
        mine = {uid: ExpertInfo(uid, contact, since=self._since, epoch=said.epoch) for uid, said in experts.items()}
        taken = {
            uid: info
            for uid, info in others.items()
            if first and info.epoch >= mine[uid].epoch and not (spare and info.epoch > mine[uid].epoch)
        }
        if taken:
            raise ExpertsTaken(_taken_text(taken))
        kept = {uid: info for uid, info in others.items() if is_senior(info, mine[uid])}
        for uid, info in kept.items():
            other = info.contact.endpoint
            why = "in a later epoch" if info.epoch > mine[uid].epoch else "too, and has for longer"
            logger.warning("%s gives %s up: %s serves it, %s", contact.endpoint, uid, other, why)
            lost = lost_updates(uid, info)
            self._emit(ExpertGivenUp(uid=uid, address=contact.endpoint, to=other, lost_updates=lost))
        for uid in others.keys() - kept.keys():
            logger.info("%s serves %s, too, and will give it up", others[uid].contact.endpoint, uid)
        return kept


def _taken_text(rivals: Mapping[str, ExpertInfo]) -> str:
    uid, info = next(iter(sorted(rivals.items())))
    more = f" (and {len(rivals) - 1} more of its experts elsewhere)" if len(rivals) > 1 else ""
    return (
        f"{uid} is served at {info.contact.endpoint} already{more}; take free places with experts=…, or stop that "
        "server first"
    )
