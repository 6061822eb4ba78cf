"""The other nodes, as one DHT node sees them: every call to them, and what it learns from these calls.

Sits between `node`, which decides what to ask, and `wire/rpc_client`. A node that answers or calls enters the routing
table. Contacts that third parties name do not, until they have answered themselves. Nodes that do not answer are left
alone for a while (the blacklist), and pinged before they are relied on again.

Order: the configuration of a DHT node, `Peers`, `FindCall` (one node asked about many keys).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from labkit.contact import Contact
from labkit.dht.lookup import OnAnswers
from labkit.dht.protocol import (
    Answered,
    Find,
    FindReply,
    KeyItems,
    NodeAnswer,
    Ping,
    Pong,
    Store,
    StoreReply,
    WireItem,
    batches,
    read_reply,
)
from labkit.dht.routing import Blacklist, RoutingTable
from labkit.dht.storage import Limits
from labkit.errors import BadReply, NoWay, RPCError
from labkit.suggest import suggest_fields
from labkit.wire.rpc_types import Caller, Reply, Request
from labkit.wire.transport import Cancellable, await_callback

R = TypeVar("R", bound=Answered)

MAX_TOLD = 4096  # nodes of which it is remembered that they know where we have moved
MAX_BACKGROUND_TASKS = 64  # beyond, background work is dropped: all of it is repeated or repaired later


@suggest_fields
@dataclass(frozen=True)
class DHTConfig:
    """How a DHT node behaves. Times are in seconds. Raises `ValueError` for values that make no sense.

    Args:
        k: Replicas of a record, and contacts in a bucket.
        alpha: Nodes that a look-up asks at a time.
        quorum: Other nodes whose values a get merges, if there are as many.
        rpc_timeout: A node that has not answered after this time has failed.
        slow_after: A look-up goes on without a node after this time, or later where round trips take longer.
        lookup_timeout: A look-up returns what it has after this time.
        refresh_period: A bucket in which nothing was looked up for this time is refreshed.
        republish_period: A record that was not stored again for this time is republished.
        cache_ttl: How long the copies live that look-ups leave on their way; they may be stale.
        blacklist_base: How long a node is left alone after its first failure; doubled with each further one in a row.
        blacklist_max: How long it is left alone at most.
        max_failures: A node is forgotten after this many failures in a row.
        limits: What the node stores.
    """

    k: int = 20
    alpha: int = 3
    quorum: int = 3
    rpc_timeout: float = 2.0
    slow_after: float = 0.3
    lookup_timeout: float = 10.0
    refresh_period: float = 300.0
    republish_period: float = 60.0
    cache_ttl: float = 10.0
    blacklist_base: float = 1.0
    blacklist_max: float = 60.0
    max_failures: int = 5
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if min(self.k, self.alpha, self.quorum, self.max_failures) < 1:
            raise ValueError("k, alpha, quorum and max_failures are at least 1")
        times = (self.rpc_timeout, self.slow_after, self.lookup_timeout, self.refresh_period, self.republish_period)
        if not all(time > 0 for time in (*times, self.cache_ttl, self.blacklist_base, self.blacklist_max)):
            raise ValueError("times are seconds above 0")


class Peers:
    """The other nodes, as one node sees them, and the calls to them.

    Args:
        caller: Makes the calls.
        contact: This node.
        config: How it behaves.
        client_only: Whether it answers no calls, and so does not name itself in those that it makes.
        on_new: Called with each contact that enters the routing table, or answers at another address only.
    """

    __slots__ = (
        "_background", "_caller", "_deviation", "_on_new", "_probing", "_round_trip", "_told", "blacklist", "calls",
        "calls_failed", "client_only", "config", "contact", "lost", "routing",
    )  # fmt: skip

    def __init__(
        self, caller: Caller, contact: Contact, config: DHTConfig, client_only: bool, on_new: Callable[[Contact], None]
    ) -> None:
        self.contact = contact
        self.client_only = client_only
        self.routing = RoutingTable(contact.node_id, config.k)
        self.blacklist = Blacklist(config.blacklist_base, config.blacklist_max)
        self.lost: dict[int, Contact] = {}  # the last k that were forgotten, to try when no other node is left
        self.calls = 0
        self.calls_failed = 0
        self._caller = caller
        self.config = config
        self._on_new = on_new
        self._background: trio.Nursery | None = None
        self._probing: set[int] = set()
        self._told: set[int] | None = None  # nodes that were told where we have moved; None if we never have
        self._round_trip = 0.0  # seconds, smoothed, over all peers
        self._deviation = 0.0

    @property
    def sender(self) -> Contact | None:
        """How requests name this node."""
        return None if self.client_only else self.contact

    @property
    def slow_after(self) -> float:
        """Seconds after which a look-up goes on without an answer. Follows the round trips, as in TCP (RFC 6298)."""
        return min(self.config.rpc_timeout, max(self.config.slow_after, self._round_trip + 4 * self._deviation))

    @property
    def round_trip(self) -> float:
        """The smoothed round-trip time over all peers, seconds."""
        return self._round_trip

    def usable(self, contact: Contact) -> bool:
        """Whether to call a node now: it is not this node, and not on the blacklist.

        A node whose back-off is over is pinged in the background first, so that no look-up waits for it a second time.
        """
        node_id = contact.node_id
        if node_id not in self.blacklist:
            return node_id != self.contact.node_id
        if not self.blacklist.blocks(node_id, _now()):
            self.probe(contact)
            return self._background is None
        return False

    def usable_of(self, contacts: Sequence[Contact]) -> list[Contact]:
        """Returns those of `contacts` that may be called now."""
        if not self.blacklist:
            return [contact for contact in contacts if contact.node_id != self.contact.node_id]
        return [contact for contact in contacts if self.usable(contact)]

    def nearest_for(self, asker: Contact | None, target: int, count: int) -> list[Contact]:
        """Returns up to `count` known and usable contacts, by distance to `target`, without the one that asks."""
        key = None if asker is None else asker.key
        found = self.routing.nearest(target, count + 1, self.usable if self.blacklist else None)
        return [contact for contact in found if contact.key != key][:count]

    def nearest(self, target: int, count: int) -> list[Contact]:
        """Returns up to `count` known and usable contacts, by distance to `target`.

        If there are none, as after an outage of our own network, it returns blacklisted ones whose back-off is over.
        """
        found = self.routing.nearest(target, count, self.usable)
        return found or self.routing.nearest(target, count, lambda c: not self.blacklist.blocks(c.node_id, _now()))

    async def call(self, contact: Contact, method: str, body: object, returns: type[R]) -> R | None:
        """Call a node. Returns its reply, or None if there was none, for whatever reason."""
        return await await_callback(partial(self.begin, contact, method, body, returns))

    def begin(
        self, contact: Contact, method: str, body: object, returns: type[R], done: Callable[[R | None], object]
    ) -> Cancellable:
        """Do what `call` does without a task (see `wire/transport`): `done` is called with the reply or None."""
        self.calls += 1
        start = _now()

        def on_reply(reply: Reply | RPCError) -> None:
            answered = None if isinstance(reply, RPCError) else reply.body
            if not isinstance(answered, returns) or answered.key != contact.key:
                self.failed(contact, ours=isinstance(reply, NoWay))
                done(None)
                return
            self._timed(_now() - start)
            self._answered(contact)
            done(answered)

        return self._caller.begin(
            contact, method, body, done=on_reply, returns=returns, timeout=self.config.rpc_timeout
        )

    def _answered(self, contact: Contact) -> None:
        """Note that a node answered at this address.

        It may have told us of another one meanwhile, as a node does that has moved. That one counts, while it works.
        """
        known, away = self.routing.get(contact.node_id), contact.node_id in self.blacklist
        self.blacklist.clear(contact.node_id)
        self._seen(contact if known is None or away else known, away=away)

    def move(self, contact: Contact) -> None:
        """Name ourselves by another contact from now on."""
        self.contact, self._told = contact, set()

    async def ping(self, contact: Contact) -> bool:
        """Whether a node answers."""
        return await self.call(contact, "dht.ping", Ping(self.sender), Pong) is not None

    async def call_find(self, contact: Contact, queries: list[str | bytes]) -> list[NodeAnswer] | None:
        """Ask a node about keys and ids. Returns an answer to each, or None if the node did not answer."""
        return await await_callback(partial(self.begin_find, contact, queries))

    def begin_find(self, contact: Contact, queries: list[str | bytes], done: OnAnswers) -> Cancellable:
        """Do what `call_find` does without a task: `done` is called with the answers."""
        return FindCall(self, contact, queries, done)

    async def call_store(self, contact: Contact, records: list[KeyItems]) -> list[str] | None:
        """Ask a node to hold items.

        Returns a text for each: empty if the node holds it now, else the reason why not. None if it did not answer.
        """
        return await await_callback(partial(self.begin_store, contact, records))

    def begin_store(
        self, contact: Contact, records: list[KeyItems], done: Callable[[list[str] | None], object]
    ) -> Cancellable:
        """Do what `call_store` does without a task: `done` is called with the texts, or None."""

        def on_reply(reply: StoreReply | None) -> None:
            done(None if reply is None else reply.refusals)

        return self.begin(contact, "dht.store", Store(self.sender, records), StoreReply, on_reply)

    def store_in_background(self, contact: Contact, rows: Iterable[tuple[str, WireItem]]) -> None:
        """Ask a node to hold items, by key, without waiting for it. It may fail."""
        for records in batches(rows):
            self.in_background(partial(self.call_store, records=records), contact)

    def called_by(self, request: Request, sender: Contact | None) -> None:
        """Note that a node called us and named itself.

        It is ignored if the connection was proven to be someone else's, or if calling it back would not be safe. A node
        that was on the blacklist is pinged at once and is back when it answers: it may be one that can call but cannot
        be called. Other callers are taken at their word, also on the address at which they are now.
        """
        if sender is None or request.peer.key not in (None, sender.key) or not sender.is_safe:
            return
        if sender.node_id in self.blacklist:
            if self._background is not None:
                self.probe(sender)
                return
            self.blacklist.clear(sender.node_id)
        self._seen(sender)
        told = self._told
        if told is not None and sender.node_id not in told and len(told) < MAX_TOLD:
            told.add(sender.node_id)  # it may have called us where we were, over a connection from then
            self.in_background(self.tell, sender)

    async def tell(self, contact: Contact) -> None:
        """Tell a node where we are now."""
        if self._told is not None and await self.ping(contact) and len(self._told) < MAX_TOLD:
            self._told.add(contact.node_id)

    def failed(self, contact: Contact, *, ours: bool = False) -> None:
        """Note that a node did not answer, or answered nonsense.

        Args:
            contact: The node.
            ours: Whether that is for lack of a way from here, so that it may well be there: it is tried again soon.
        """
        self.calls_failed += 1
        node_id = contact.node_id
        if self.routing.get(node_id) not in (None, contact):
            return  # it has moved: where it is now, it may well answer
        failures = self.blacklist.failed(node_id, _now(), again=not ours)
        self.routing.failed(node_id)
        if failures >= self.config.max_failures:
            forgotten = self.routing.remove(node_id)
            if forgotten is not None:
                self.lost[node_id] = forgotten
                if len(self.lost) > self.config.k:
                    del self.lost[next(iter(self.lost))]

    def probe(self, contact: Contact) -> None:
        """Ping a node in the background, to learn whether it is alive."""
        if contact.node_id not in self._probing and self.in_background(self._probe, contact):
            self._probing.add(contact.node_id)

    async def _probe(self, contact: Contact) -> None:
        try:
            await self.ping(contact)
        finally:
            self._probing.discard(contact.node_id)

    def run_in(self, nursery: trio.Nursery | None) -> None:
        """Run background work in this nursery from now on; with None, nowhere."""
        self._background = nursery

    def in_background(self, function: Callable[[Contact], Awaitable[object]], contact: Contact) -> bool:
        """Start background work, unless there is no nursery for it, or too much of it. Returns whether it did."""
        if self._background is None or len(self._background.child_tasks) > MAX_BACKGROUND_TASKS:
            return False
        try:
            self._background.start_soon(function, contact)
        except RuntimeError:  # the nursery has just ended
            return False
        return True

    def _seen(self, contact: Contact, *, away: bool = False) -> None:
        """Note that a node is there. `away`: whether it did not answer before, and thus may have missed records."""
        known = self.routing.get(contact.node_id)
        doubtful = self.routing.seen(contact, _now())
        if doubtful is not None:
            self.probe(doubtful)
        if (known is None or (away and known != contact)) and contact.node_id in self.routing:
            self.lost.pop(contact.node_id, None)
            self._on_new(contact)

    def _timed(self, seconds: float) -> None:
        if self._round_trip == 0.0:
            self._round_trip, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self._round_trip) - self._deviation) / 4
            self._round_trip += (seconds - self._round_trip) / 8


def _now() -> float:
    return trio.current_time()


class FindCall:
    """A call that asks one node about keys and ids.

    Records that had no room in the reply are asked for again until all of them have come.
    """

    __slots__ = ("_answers", "_call", "_contact", "_done", "_peers", "_queries")

    def __init__(self, peers: Peers, contact: Contact, queries: list[str | bytes], done: OnAnswers) -> None:
        self._peers = peers
        self._contact = contact
        self._queries = queries
        self._done = done
        self._answers: dict[str | bytes, NodeAnswer] = {}
        self._call: Cancellable | None = None
        self._ask(queries)

    def _ask(self, missing: list[str | bytes]) -> None:
        body = Find.of(self._peers.sender, missing)
        on_reply = partial(self._on_reply, body.queries(), trio.current_time())
        self._call = self._peers.begin(self._contact, "dht.find", body, FindReply, on_reply)

    def _on_reply(self, asked: list[str | bytes], at: float, reply: FindReply | None) -> None:
        if reply is None:
            self._done(None)
            return
        peers, left_out = self._peers, []
        try:
            read = read_reply(reply, asked, at, peers.config.k, peers.config.limits)
            for query, (answer, again) in zip(asked, read, strict=True):
                if again:
                    left_out.append(query)
                self._answers[query] = answer._replace(contacts=peers.usable_of(answer.contacts))
            if len(left_out) == len(asked):
                raise BadReply("the reply leaves all records out")
        except BadReply:
            peers.failed(self._contact)
            self._done(None)
            return
        if left_out:
            self._ask(left_out)
        else:
            self._done([self._answers[query] for query in self._queries])

    def cancel(self) -> None:
        """Give the call up."""
        if self._call is not None:
            self._call.cancel()
