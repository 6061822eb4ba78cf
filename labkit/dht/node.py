"""The DHT node: stores and finds records on the nodes whose ids are nearest to their keys, and answers other nodes.

On a batch's way this runs when beam search misses its cache (`directory` calls `get_many`), and when a server declares
its experts (`store_many`). Source: Kademlia, sections 2.3 (protocol) and 2.5 (republishing).

What a get promises: it merges what this node holds with what the nearest other replicas hold, `quorum` of them if there
are as many. (With `latest=False` it takes what this node holds, or else one replica's copy.) For each subkey the higher
sequence number wins, then the later expiration. Copies that look-ups cache on their way are made of plain values only,
live `cache_ttl` seconds at most, and never end a look-up without a replica's answer. If a key was stored both plain and
as a dictionary (nodes refuse to mix them), the dictionary is returned.

An expiration travels as time left. A get counts it from when it asked, so that it is never later than the replica's. A
store counts it from its arrival, so every republishing adds one network delay to a record's life.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import trio

from labkit.contact import Contact
from labkit.dht import protocol
from labkit.dht.covering import read_replicas
from labkit.dht.lookup import Lookup, run_lookups
from labkit.dht.maintenance import Maintenance
from labkit.dht.peers import DHTConfig, Peers
from labkit.dht.protocol import KeyItems, WireItem
from labkit.dht.replicas import Replicas
from labkit.dht.routing import RoutingTable
from labkit.dht.service import Service
from labkit.dht.shared_lookups import Flights
from labkit.dht.signing import merge, verify
from labkit.dht.storage import Entry, IsGenuine, Item, Storage, Value, anything, key_id
from labkit.wire.rpc_types import Caller, Methods
from labkit.wire.transport import await_all

__all__ = ["DHTConfig", "DHTNode", "Entry", "Value"]

GetResult = Value | dict[str, Value] | None  # a plain value, or a dictionary by subkey


class DHTNode:
    """A node of the DHT. Its `methods` have to be served (`serve_rpc`) at its contact; `run` is its background work.

    Args:
        caller: Makes the calls to other nodes.
        contact: This node's own contact.
        config: How it behaves.
        client_only: Whether it only stores and finds. Then it holds nothing, answers no calls, and other nodes do not
            learn of it.
        is_genuine: Whether an entry is by who it names, for those whose form says that. What is not is neither stored
            nor found.
    """

    methods: Methods

    def __init__(
        self, caller: Caller, contact: Contact, config: DHTConfig | None = None, *, client_only: bool = False,
        is_genuine: IsGenuine = anything,
    ) -> None:  # fmt: skip
        self.config = config or DHTConfig()
        self.client_only = client_only
        self.storage = Storage(verify, self.config.limits, is_genuine)
        self.peers = Peers(caller, contact, self.config, client_only=client_only, on_new=self._on_new)
        self._flights = Flights(self._run_lookups)
        self.replicas = Replicas(self.peers, self.find_nodes)
        self._maintenance = Maintenance(self.peers, self.storage, self.replicas, self.find_nodes)
        self._service = Service(self.storage, self.peers, self.config, self._maintenance.republish_at)
        self.methods = {} if client_only else self._service.methods

    @property
    def contact(self) -> Contact:
        """This node's own contact."""
        return self.peers.contact

    def move(self, contact: Contact) -> None:
        """Take another address, and tell the nodes that know this one, in the background. Its key stays the same."""
        self.peers.move(contact)
        self.peers.in_background(self._maintenance.tell_all, contact)

    def come_back(self) -> None:
        """Find back to the other nodes and tell them where we are, in the background: this machine was away."""
        self.peers.blacklist.forgive()
        self.peers.in_background(self._maintenance.come_back, self.contact)

    def suspect(self, contact: Contact) -> None:
        """Leave a node alone for a while that others have found gone. It is back when it answers a ping."""
        self.peers.failed(contact)

    @property
    def routing(self) -> RoutingTable:
        """The contacts that this node knows."""
        return self.peers.routing

    # ------------------------------------------------------------ joining

    async def bootstrap(self, contacts: Iterable[Contact]) -> int:
        """Join the network of `contacts`. Returns how many of them answered."""
        return await self._maintenance.join(contacts)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the background work of the node, until cancelled. `task_status` is told when it is ready."""
        try:
            async with trio.open_nursery() as nursery:
                self.peers.run_in(nursery)
                task_status.started()
                await self._maintenance.run()
        finally:
            self.peers.run_in(None)

    # ------------------------------------------------------------ storing

    async def store(self, key: str, value: bytes, ttl: float, subkey: str | None = None) -> int:
        """Store a value.

        Args:
            key: The key to find it by.
            value: The bytes to store.
            ttl: Seconds for which to store it.
            subkey: With one, the value becomes an entry of the key's dictionary.

        Returns:
            How many nodes, this one included, hold it now.

        Raises:
            ValueError: No node would take it.
        """
        return (await self.store_many([Entry(key, value, ttl, subkey)]))[0]

    async def store_many(self, entries: Sequence[Entry]) -> list[int]:
        """Store several entries. Returns for each what `store` does. One call to a node carries all that it gets."""
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
                item.republish_at, item.ours = self._maintenance.republish_at(), True
                held[index] += self.storage.put(entry.key, entry.subkey, item, now) is None
            wire = WireItem(entry.value, entry.ttl, entry.subkey, entry.sequence, False, entry.owner, entry.signature)
            for contact in contacts:
                outgoing.setdefault(contact, []).append((index, entry.key, wire))

        calls: list[tuple[Contact, list[KeyItems], list[int]]] = []
        for contact, rows in outgoing.items():
            position = 0
            for records in protocol.batches((key, wire) for _, key, wire in rows):
                count = sum(len(record.items) for record in records)
                calls.append((contact, records, [index for index, _, _ in rows[position : position + count]]))
                position += count

        self._flights.forget([entry.key for entry in entries])  # those that began before this was stored
        answers = await await_all([partial(self.peers.begin_store, contact, records) for contact, records, _ in calls])
        for (_, _, indices), refusals in zip(calls, answers, strict=True):
            for index, refusal in zip(indices, refusals or (), strict=False):
                held[index] += not refusal
        self._flights.forget([entry.key for entry in entries])
        return held

    # ------------------------------------------------------------ finding

    async def get(self, key: str, *, latest: bool = True) -> GetResult:
        """Find what is stored under a key.

        Args:
            key: The key.
            latest: Whether to ask other replicas, too, for what was stored last. If not, the first copy will do: much
                faster if this node holds one, but it may miss what others have stored since.

        Returns:
            The value stored under `key`, or its dictionary by subkey, or None if there is nothing unexpired.
        """
        return (await self.get_many([key], latest=latest))[key]

    async def get_many(
        self, keys: Sequence[str], *, latest: bool = True, quorum: int | None = None
    ) -> dict[str, GetResult]:
        """Returns for each of several keys what `get` does. One call to a node carries all that it is asked about.

        Args:
            keys: The keys.
            latest: See `get`.
            quorum: Other nodes whose values are merged, if there are as many; by default the config's. With it, the
                look-ups begin now; else those of other gets that are under way will do. And what this node stores
                itself is read where it was stored, without a look-up.
        """
        now = trio.current_time()
        needed = 1 if not latest else self.config.quorum if quorum is None else quorum
        known = {} if quorum is None else await read_replicas(self.peers, self.replicas.known(keys), quorum)
        wanted: dict[str | bytes, Callable[[], Lookup]] = {
            key: partial(self._new_lookup, key, key_id(key), needed)
            for key in keys
            if key not in known and (latest or not self.storage.get(key, now))
        }
        lookups, own = await self._flights.look_up(wanted, needed, share=quorum is None)
        now = trio.current_time()
        found: dict[str, GetResult] = {}
        to_cache: dict[Contact, list[tuple[str, WireItem]]] = {}
        for key in dict.fromkeys(keys):
            lookup = lookups.get(key)
            answers = known.get(key, []) if lookup is None else lookup.answers()
            if lookup is not None and key in own and answers:
                self.replicas.note(lookup.target, lookup.named(self.config.k))
            versions = [(answer.at, answer.items) for answer in answers]
            items = merge(key, self.storage.get(key, now), versions, now, self.storage.is_genuine)
            plain = items.pop(None, None)
            if items:
                found[key] = {subkey: Value(i.value, i.expires_at) for subkey, i in items.items() if subkey is not None}
            elif plain is not None:
                found[key] = Value(plain.value, plain.expires_at)
                lacking = lookup.nearest_without() if lookup is not None and key in own else None
                if lacking is not None:
                    until = min(plain.expires_at, now + self.config.cache_ttl)
                    wire = WireItem(plain.value, until - now, None, plain.sequence, True, plain.owner, plain.signature)
                    to_cache.setdefault(lacking, []).append((key, wire))
            else:
                found[key] = None
        for contact, rows in to_cache.items():
            self.peers.store_in_background(contact, rows)
        return found

    async def find_nodes(self, targets: Sequence[int]) -> dict[int, list[Contact]]:
        """Returns for each 160-bit id the k nearest nodes that answered, by distance."""
        ids = {target: target.to_bytes(protocol.ID_BYTES, "big") for target in targets}
        lookups, _ = await self._flights.look_up(
            {query: partial(self._new_lookup, query, target) for target, query in ids.items()}, 0
        )
        return {target: lookups[query].nearest(self.config.k) for target, query in ids.items()}

    def _new_lookup(self, query: str | bytes, target: int, quorum: int = 0) -> Lookup:
        config = self.config
        start = self.peers.nearest(target, config.k)
        return Lookup(query, target, start, k=config.k, alpha=config.alpha, quorum=quorum)

    async def _run_lookups(self, lookups: Sequence[Lookup]) -> None:
        config = self.config
        late = await run_lookups(
            lookups, self.peers.begin_find, slow_after=self.peers.slow_after, timeout=config.lookup_timeout,
            max_queries=protocol.MAX_QUERIES,
        )  # fmt: skip
        for contact in late:  # the look-ups did not wait for them: find out whether they are alive
            self.peers.probe(contact)
        now = trio.current_time()
        for lookup in lookups:
            self.routing.looked_up(lookup.target, now)

    # ------------------------------------------------------------ the rest

    def _on_new(self, contact: Contact) -> None:
        """Give a node the records that belong to it: also if it has moved, and was not reached before."""
        if len(self.storage):
            self.peers.in_background(self._maintenance.hand_over, contact)

    def statistics(self) -> dict[str, float | int]:
        """Returns gauges and counters: nodes known, records held, calls made and served, round trip in seconds."""
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
