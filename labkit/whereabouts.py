"""Where a node is: it notices that its machine has another address or has slept, and asks others whether they reach it.

A laptop that changes its network, or wakes up, is back in its swarm without a restart: the node announces its new
address, drops the connections of before, tells the nodes that it knows, and declares its experts anew. No batch passes
here. Every `LOOK_PERIOD` seconds:

1. Look at this machine's addresses, and at a clock that goes on while it sleeps. 2. If something has changed, come
back. 3. If the answer may be another one now, ask others whether they reach the node (`reachability`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import trio

from labkit.contact import Address, Contact, is_loopback
from labkit.dht.node import DHTNode
from labkit.errors import ConnectionLost
from labkit.events import Emit, ReachabilityChanged
from labkit.reachability import (
    ASK_PERIOD,
    Reach,
    Reachability,
    ask_others,
    is_elsewhere,
    is_near,
    judge,
    not_known,
    only_here,
    share_version,
)
from labkit.wire.addresses import (
    find_own_address,
    further_addresses,
    ipaddress_or_none,
    own_addresses,
    resolve,
    split_address,
)
from labkit.wire.rpc_client import Client

LOOK_PERIOD = 3.0  # seconds between two looks at this machine's addresses
SLEPT = 10.0  # seconds by which a look may be late: beyond, the machine has slept, and others have given its links up
RESOLVE_TIMEOUT = 5.0  # seconds for the names of the nodes that were joined
ASK_AGAIN = {Reach.YES: 300.0, Reach.NO: 30.0, Reach.UNKNOWN: 10.0, Reach.HERE: 0.0}  # seconds, by the last answer
NEWCOMER_PAUSE = 5.0  # seconds, if others have come since who may answer otherwise

Move = Callable[[str, int, str, Sequence[Address]], object]  # host, port, reason, further addresses


def sleepless_clock() -> float:
    """Returns seconds on a clock that goes on while the machine sleeps."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time() if boottime is None else time.clock_gettime(boottime)


def _at_first(contact: Contact) -> Contact:
    """Returns a contact without its further addresses."""
    return msgspec.structs.replace(contact, also=())


class Whereabouts:
    """Where one node is, and whether others reach it there. All of it belongs to one trio thread.

    Args:
        client: The node's own.
        dht: The node's own: it knows others, and has the contact that is announced.
        listen: The address that the user gave to listen at.
        announce: The one to announce, if the user gave one.
        joined: The nodes that were joined.
        emit: Called with a `ReachabilityChanged` when there is another answer.
        clock: Goes on while the machine sleeps, seconds.

    Attributes:
        direct: The node as it is reached without a relay.
        now: Whether others reach it where it says to be.
        settled: Set when that is known for the first time, or it is known that nobody is there to ask.
        news: Set, and replaced by a new one, whenever `direct` or `now` has changed.
    """

    def __init__(
        self, client: Client, dht: DHTNode, listen: str, announce: str | None, joined: Sequence[Contact], emit: Emit, *,
        clock: Callable[[], float] = sleepless_clock,
    ) -> None:  # fmt: skip
        self._client = client
        self._dht = dht
        self._listen, self._announce = listen, announce
        self._joined = list(joined)
        self._emit = emit
        self._clock = clock
        self._asked: tuple[Contact, float] | None = None  # about which contact others were asked last, and when
        self._asking = False
        self._denied: set[bytes] = set()  # the keys of those who have tried, and did not reach `direct`
        self._asked_among: set[str] = set()  # the hosts of the nodes on other machines that were known then
        self._address = None if dht.contact.is_loopback else dht.contact.host  # of this machine; None if it has none
        self._further = tuple(host for host, _ in dht.contact.also)
        self._not_reached: set[str | None] = set()  # addresses of it that are not announced, since others say so
        self.direct = dht.contact
        self.now = not_known(self.direct, trying=True)
        self.settled = trio.Event()
        self.news = trio.Event()

    async def run(self, move: Move, declare_anew: Callable[[], object]) -> None:
        """Look, come back and ask, until cancelled.

        Args:
            move: Gives the node another address: host, port, the reason in words, and further addresses.
            declare_anew: Lets the node's experts be declared at once.
        """
        host = split_address(self._listen)[0]
        ip = ipaddress_or_none(host)
        wide = ip is not None and ip.is_unspecified  # else it listens at one address only, whatever changes
        toward = await self._resolve_joined() if wide else []
        if wide and self._announce is not None:
            await self._look(host, toward)
        looked_at = self._clock()
        async with trio.open_nursery() as nursery:
            while True:
                self._ask_if_due(nursery, move)  # 3
                await trio.sleep(LOOK_PERIOD)
                before, looked_at = looked_at, self._clock()  # 1
                slept = looked_at - before > LOOK_PERIOD + SLEPT
                further = self._further
                changed = wide and await self._look(host, toward)
                if slept or changed:
                    reason = "this machine has slept" if slept else "this machine has another address"
                    self._come_back(move, declare_anew, reason)  # 2
                elif further != self._further:
                    self._move(move, "this machine has other further addresses")
                    self._tell_news()

    async def _resolve_joined(self) -> list[Contact]:
        """Returns the nodes that were joined, by IP address, so that no look has to ask for it."""
        found = []
        with trio.move_on_after(RESOLVE_TIMEOUT):
            for contact in self._joined:
                try:
                    found.append(msgspec.structs.replace(contact, host=await resolve(contact.host)))
                except ConnectionLost:
                    continue
        return found

    # ------------------------------------------------------------ coming back

    async def _look(self, host: str, toward: Sequence[Contact]) -> bool:
        """Take note of this machine's addresses. Returns whether it has another first one than before, or one again."""
        address = await find_own_address(host, toward)
        found = None if is_loopback(address) else address
        before, self._address = self._address, found
        if found is not None:
            self._further = further_addresses(host, found)
        return found is not None and found != before

    def _move(self, move: Move, reason: str) -> bool:
        """Announce this machine's addresses. Returns whether others are told of another one than before."""
        before = self.direct
        if self._address is None or self._announce is not None:
            return False
        further = self._further if before.secure else ()
        host, *others = [h for h in (self._address, *further) if h not in self._not_reached] or [self._address]
        also = tuple((other, before.port) for other in others)
        self.direct = msgspec.structs.replace(before, host=host, also=also)
        if host != before.host:
            self._denied = set()
        if self.direct == before or self._dht.contact != before:
            return False
        move(self.direct.host, self.direct.port, reason, also)
        return True

    def _come_back(self, move: Move, declare_anew: Callable[[], object], reason: str) -> None:
        self._client.forget_all()  # they lead over the old address, or to nodes that have given us up
        if not self._move(move, reason):
            declare_anew()
        self._dht.come_back()
        self._asked = None
        self._tell_news()

    # ------------------------------------------------------------ asking others

    async def try_direct(self) -> Reachability:
        """Ask others whether they reach the node without a relay, now."""
        known = {contact.key: contact for contact in self._known()}
        denied = [known[key] for key in self._denied if key in known]
        first = _at_first(self.direct)
        votes = await ask_others(self._client, first, [*denied, *self._joined], self._known)
        if not votes or (denied and self._denied.isdisjoint(vote.by.key for vote in votes)):
            return not_known(self.direct, silent=True)  # a yes of others is no news
        return judge(self.direct, votes, self._listen, self._announce)

    async def _ask_about(self, contact: Contact, there: Contact | None = None) -> Reachability:
        """Ask others whether they reach a contact of the node. `there`: the part of it that they are to call."""
        votes = await ask_others(self._client, there or contact, self._joined, self._known)
        return judge(contact, votes, self._listen, self._announce) if votes else not_known(contact, silent=True)

    def ask_again(self) -> None:
        """Ask others soon whether they reach the node where it is now, since the last answer may not hold any more."""
        self._asked = None

    def _known(self) -> list[Contact]:
        """Returns the nodes to ask: what those of our own network find says nothing of others."""
        direct = self._client.endpoint.direct
        return [contact for contact in self._dht.routing if contact.key not in direct]

    def _ask_if_due(self, nursery: trio.Nursery, move: Move) -> None:
        contact = self._dht.contact
        if contact.is_loopback or (self._address is None and contact == self.direct):
            self._asked = None
            self._say(only_here(contact, self._listen, self._announce))
        elif not self._elsewhere(contact):
            self._asked = None  # so that the first who comes is asked at once
            self._say(not_known(contact))
        elif not self._asking and self._is_due(contact):
            self._asking, self._asked = True, (contact, trio.current_time())
            self._asked_among = {other.host for other in self._elsewhere(contact)}
            nursery.start_soon(self._ask, contact, move)

    def _elsewhere(self, contact: Contact) -> list[Contact]:
        """Returns the nodes on other machines that are known now."""
        own = own_addresses()
        return [other for other in (*self._joined, *self._known()) if is_elsewhere(other, contact, own)]

    def _is_due(self, contact: Contact) -> bool:
        if self._asked is None or self._asked[0] != contact:
            return True
        pause = NEWCOMER_PAUSE if self._may_be_another_with_newcomers(contact) else ASK_AGAIN[self.now.state]
        return trio.current_time() - self._asked[1] >= pause

    def _may_be_another_with_newcomers(self, contact: Contact) -> bool:
        """Whether a yes is only that of a container's own host, or of our own network, and others have come since."""
        votes = self.now.votes
        if self.now.state is not Reach.YES:
            return False
        newcomers = [other for other in self._elsewhere(contact) if other.host not in self._asked_among]
        if len({vote.by.host for vote in votes}) < 2:
            return bool(newcomers)
        return all(is_near(vote.by) for vote in votes) and not all(map(is_near, newcomers))

    async def _ask(self, contact: Contact, move: Move) -> None:
        try:
            if contact == self.direct:
                found = await self._ask_about(contact, _at_first(contact))
            else:
                found = await self._ask_about(contact)
            if contact == self._dht.contact:  # else it has moved meanwhile, and is asked about anew
                if contact == self.direct and found.state is Reach.NO:
                    self._denied = {vote.by.key for vote in found.votes if not vote.reached}
                self._say(found)
            if contact == self.direct and self._announce is None:
                await self._ask_about_the_other_version(contact, found.state, move)
        finally:
            self._asking = False

    async def _ask_about_the_other_version(self, contact: Contact, reach: Reach, move: Move) -> None:
        """Ask about addresses of the other IP version alone: who has no way to the first one calls there.

        Those that others do not reach are not announced, so that they are not called in vain. Nor is the first one, if
        others reach only these.

        Args:
            contact: The node, as it announces itself.
            reach: Whether others reach it at its first address.
            move: Gives the node another address.
        """
        reached: set[str] = set()
        for host in (self._address or contact.host, *self._further):
            there = Contact(contact.key, host, contact.port, contact.secure)
            if share_version(_at_first(contact), there):
                continue
            await trio.sleep(ASK_PERIOD)  # as nobody calls back again before
            found = await self._ask_about(there)
            if found.state is Reach.YES:
                reached.add(host)
            elif found.state is Reach.NO:
                self._not_reached.add(host)
        if reach is Reach.NO and reached:
            self._not_reached.add(contact.host)
        self._not_reached -= reached
        self._not_reached &= {self._address, *self._further}
        before = self.direct
        self._move(move, "others reach other addresses of it than before")
        if self.direct != before:
            self._tell_news()

    def _say(self, found: Reachability) -> None:
        before, self.now = self.now, found
        news = (before.state, before.contact) != (found.state, found.contact) or not self.settled.is_set()
        self.settled.set()
        if news:
            self._emit(ReachabilityChanged(contact=found.contact, state=str(found.state), text=found.text))
            self._tell_news()

    def _tell_news(self) -> None:
        self.news.set()
        self.news = trio.Event()
