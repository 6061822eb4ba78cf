"""The DHT node: stores and finds records on the nodes whose ids are nearest to their keys, and answers other nodes.

A batch comes by here when beam search misses its cache (`directory` calls `get_many`), and experts come by here when
their server announces them (`store_many`). Source: Kademlia, sections 2.3 (protocol) and 2.5 (republishing).

What a get promises: it merges what this node holds with what the nearest other replicas say, `quorum` of them if there
are as many. (One that asks for any copy takes what this node holds, or else one replica's word.) For each subkey the
higher sequence number wins, then the later expiration. Copies that look-ups cache on their way are made of plain values
only, live `cache_ttl` seconds at most and never end a look-up without a replica's word. If a key was stored both plain
and as a dictionary (nodes refuse to mix them), the dictionary is returned.

An expiration travels as time left. A get counts it from when it asked, so it never comes out later than the replica's;
a store counts it from its arrival, so every republishing adds one network delay to a record's life.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import trio

from labkit.contact import Contact
from labkit.dht import protocol
from labkit.dht.lookup import Lookup, OnAnswers, run_lookups
from labkit.dht.maintenance import Maintenance
from labkit.dht.peers import DHTConfig, FindCall, Peers
from labkit.dht.protocol import KeyItems, NodeAnswer, Store, StoreReply, WireItem
from labkit.dht.replicas import Replicas
from labkit.dht.routing import RoutingTable
from labkit.dht.service import Service
from labkit.dht.signing import merge, verify
from labkit.dht.storage import Entry, Item, Storage, Value, key_id
from labkit.wire.rpc_types import Caller, Methods
from labkit.wire.transport import Cancellable, await_callback

__all__ = ["DHTConfig", "DHTNode", "Entry", "Value"]

Found = Value | dict[str, Value] | None


class DHTNode:
    """One participant of the DHT.

    `methods` is what it answers and has to be served (`serve_rpc`) where `contact` says; `run` is its background work.
    A node that is `client_only` stores and finds, but holds nothing, answers nobody, and is not made known to others.
    """

    methods: Methods

    def __init__(
        self, caller: Caller, contact: Contact, config: DHTConfig | None = None, *, client_only: bool = False
    ) -> None:
        self.contact = contact
        self.config = config or DHTConfig()
        self.client_only = client_only
        self.storage = Storage(verify, self.config.limits)
        self.peers = Peers(caller, contact, self.config, client_only=client_only, on_new=self._on_new)
        self.replicas = Replicas(self)
        self._maintenance = Maintenance(self)
        self._service = Service(self.storage, self.peers, self.config, self.republish_at)
        self.methods = {} if client_only else self._service.methods

    @property
    def routing(self) -> RoutingTable:
        """The contacts that this node knows."""
        return self.peers.routing

    # ------------------------------------------------------------ joining

    async def bootstrap(self, contacts: Iterable[Contact]) -> int:
        """Join the network of `contacts`. Returns how many of them answered.

        1. Ping them. 2. Look up our own id, which also makes us known to our neighbours. 3. Get to know a few nodes in
        each bucket that is farther away than the nearest neighbour (section 2.3).
        """
        contacts = [contact for contact in contacts if contact.node_id != self.contact.node_id]
        answered = await self._maintenance.ping_all(contacts)  # 1
        if answered:
            await self.find_nodes([self.contact.node_id])  # 2
            await self._maintenance.fill_buckets()  # 3
        return answered

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Expire and republish records, refresh buckets, and do the background work of calls, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self.peers.run_in(nursery)
                task_status.started()
                await self._maintenance.run()
        finally:
            self.peers.run_in(None)

    # ------------------------------------------------------------ storing

    async def store(self, key: str, value: bytes, ttl: float, subkey: str | None = None) -> int:
        """Store a value for `ttl` seconds. Returns how many nodes, this one included, hold it now.

        With a `subkey` it becomes an entry of the key's dictionary. Raises `ValueError` for what no node would take.
        """
        return (await self.store_many([Entry(key, value, ttl, subkey)]))[0]

    async def store_many(self, entries: Sequence[Entry]) -> list[int]:
        """Store several entries; one call to a node carries all that it gets. Returns for each what `store` does."""
        for entry in entries:
            problem = self.config.limits.problem(entry.key, entry.subkey, entry.value, entry.ttl)
            if problem is not None:
                raise ValueError(f"cannot store {entry.key!r}: {problem}")
            if not 0 <= entry.sequence < 2**63:
                raise ValueError(f"cannot store {entry.key!r}: sequence={entry.sequence} is not between 0 and 2**63")
        replicas = await self.replicas.of(list(dict.fromkeys(entry.key for entry in entries)))
        now = trio.current_time()
        held = [0] * len(entries)
        outgoing: dict[Contact, list[tuple[int, str, WireItem]]] = {}
        for index in sorted(range(len(entries)), key=lambda index: entries[index].key):  # one key's entries together
            entry = entries[index]
            contacts, here = replicas[entry.key]
            item = Item(entry.value, now + entry.ttl, entry.sequence, entry.owner, entry.signature)
            if here:
                item.republish_at, item.ours = self.republish_at(), True
                held[index] += self.storage.put(entry.key, entry.subkey, item, now) is None
            wire = WireItem(entry.value, entry.ttl, entry.subkey, entry.sequence, False, entry.owner, entry.signature)
            for contact in contacts:
                outgoing.setdefault(contact, []).append((index, entry.key, wire))

        async def store_at(contact: Contact, records: list[KeyItems], indices: list[int]) -> None:
            refusals = await self.call_store(contact, records)
            if refusals is None:
                for record in records:
                    self.replicas.forget(record.key)
            for index, refusal in zip(indices, refusals or (), strict=False):
                held[index] += not refusal

        async with trio.open_nursery() as nursery:
            for contact, rows in outgoing.items():
                position = 0
                for records in protocol.batches((key, wire) for _, key, wire in rows):
                    count = sum(len(record.items) for record in records)
                    indices = [index for index, _, _ in rows[position : position + count]]
                    position += count
                    nursery.start_soon(store_at, contact, records, indices)
        return held

    # ------------------------------------------------------------ finding

    async def get(self, key: str, *, latest: bool = True) -> Found:
        """The value stored under `key`, or its dictionary by subkey, or None if there is nothing unexpired.

        `latest`: ask other replicas too, for what was stored last. False: the first copy will do, which is much faster
        where this node holds one, and may miss what others have stored since.
        """
        return (await self.get_many([key], latest=latest))[key]

    async def get_many(self, keys: Sequence[str], *, latest: bool = True) -> dict[str, Found]:
        """What `get` returns, for each of several keys. One call to a node carries all that it is asked about."""
        now = trio.current_time()
        quorum = self.config.quorum if latest else 1
        searches = {
            key: self._search(key, key_id(key), quorum) for key in keys if latest or not self.storage.get(key, now)
        }
        await self._look_up(list(searches.values()))
        now = trio.current_time()
        found: dict[str, Found] = {}
        to_cache: dict[Contact, list[tuple[str, WireItem]]] = {}
        for key in dict.fromkeys(keys):
            search = searches.get(key)
            answers = [] if search is None else [(answer.at, answer.items) for answer in search.answers()]
            items = merge(key, self.storage.get(key, now), answers, now)
            plain = items.pop(None, None)
            if items:
                found[key] = {subkey: Value(i.value, i.expires_at) for subkey, i in items.items() if subkey is not None}
            elif plain is not None:
                found[key] = Value(plain.value, plain.expires_at)
                lacking = None if search is None else search.nearest_without()
                if lacking is not None:
                    until = min(plain.expires_at, now + self.config.cache_ttl)
                    wire = WireItem(plain.value, until - now, None, plain.sequence, True, plain.owner, plain.signature)
                    to_cache.setdefault(lacking, []).append((key, wire))
            else:
                found[key] = None
        for contact, rows in to_cache.items():
            self.send_in_background(contact, rows)
        return found

    async def find_nodes(self, targets: Sequence[int]) -> dict[int, list[Contact]]:
        """For each 160-bit id the k nearest nodes that answered, by distance."""
        searches = {target: self._search(target.to_bytes(protocol.ID_BYTES, "big"), target) for target in targets}
        await self._look_up(list(searches.values()))
        return {target: search.nearest(self.config.k) for target, search in searches.items()}

    def _search(self, query: str | bytes, target: int, quorum: int = 0) -> Lookup:
        config = self.config
        start = self.peers.nearest(target, config.k)
        return Lookup(query, target, start, k=config.k, alpha=config.alpha, quorum=quorum)

    async def _look_up(self, searches: Sequence[Lookup]) -> None:
        config = self.config
        late = await run_lookups(
            searches, self.begin_find, slow_after=self.peers.slow_after, timeout=config.lookup_timeout,
            max_queries=protocol.MAX_QUERIES,
        )  # fmt: skip
        for contact in late:  # the look-up did not wait for them; find out whether they are alive
            self.peers.probe(contact)
        now = trio.current_time()
        for search in searches:
            self.routing.looked_up(search.target, now)

    # ------------------------------------------------------------ asking

    async def call_find(self, contact: Contact, queries: list[str | bytes]) -> list[NodeAnswer] | None:
        """Ask a node about keys and ids. Returns an answer to each, or None if it did not answer."""
        return await await_callback(partial(self.begin_find, contact, queries))

    def begin_find(self, contact: Contact, queries: list[str | bytes], done: OnAnswers) -> Cancellable:
        """The same without a task: `done` is told the answers."""
        return FindCall(self.peers, contact, queries, done)

    async def call_store(self, contact: Contact, records: list[KeyItems]) -> list[str] | None:
        """Give items to a node. Returns its refusals (empty texts for what it holds now), or None without an answer."""
        reply = await self.peers.call(contact, "dht.store", Store(self.peers.sender, records), StoreReply)
        return None if reply is None else reply.refusals

    def send_in_background(self, contact: Contact, rows: Iterable[tuple[str, WireItem]]) -> None:
        """Give items to a node, without waiting for it or caring much whether it works."""
        for records in protocol.batches(rows):
            self.peers.in_background(partial(self.call_store, records=records), contact)

    # ------------------------------------------------------------ the rest

    def _on_new(self, contact: Contact) -> None:
        """A node was seen for the first time: it may be nearer to some of our records than we are."""
        if len(self.storage):
            self.peers.in_background(self._maintenance.hand_over, contact)

    def republish_at(self) -> float:
        """When an item stored now is due to be republished."""
        return trio.current_time() + self.config.republish_period * self._maintenance.jitter

    def statistics(self) -> dict[str, float | int]:
        """Gauges and counters: nodes, keys and bytes held, calls made, failed and served, seconds of round trip."""
        return {
            "nodes": len(self.routing),
            "blacklisted": self.peers.blacklist.count(trio.current_time()),
            "records": len(self.storage),
            "record_bytes": self.storage.size,
            "calls": self.peers.calls,
            "calls_failed": self.peers.calls_failed,
            "calls_served": self._service.served,
            "round_trip": self.peers.round_trip,
        }
