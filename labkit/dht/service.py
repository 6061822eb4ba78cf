"""The answers of a DHT node to the calls of other nodes: `dht.ping`, `dht.find` and `dht.store`.

Nothing here waits. The wire has checked the bodies; `storage` decides what is stored.
Source: Kademlia, section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from labkit.contact import Contact, intern_contact
from labkit.dht.peers import DHTConfig, Peers
from labkit.dht.protocol import MAX_ENTRIES, Find, Ping, Pong, ReplyBuilder, Store, StoreReply, from_wire
from labkit.dht.storage import Item, Role, Storage, key_id
from labkit.errors import BadRequest
from labkit.wire.rpc_types import Methods, Reply, Request, SyncMethod


class Service:
    """The handlers of one DHT node.

    Args:
        storage: The records that it holds.
        peers: The other nodes.
        config: How it behaves.
        republish_at: Returns when an item that is stored now is due to be republished.
    """

    __slots__ = ("_config", "_peers", "_republish_at", "_storage", "served")

    def __init__(self, storage: Storage, peers: Peers, config: DHTConfig, republish_at: Callable[[], float]) -> None:
        self._storage = storage
        self._peers = peers
        self._config = config
        self._republish_at = republish_at
        self.served = 0

    @property
    def methods(self) -> Methods:
        """The methods by name, for `serve_rpc`."""
        return {
            "dht.ping": SyncMethod(self.rpc_ping, Ping),
            "dht.find": SyncMethod(self.rpc_find, Find),
            "dht.store": SyncMethod(self.rpc_store, Store),
        }

    def rpc_ping(self, request: Request) -> Reply:
        """Answer that this node is there."""
        self._called(request, request.body.sender)
        return Reply(Pong(self._peers.contact.key))

    def rpc_find(self, request: Request) -> Reply:
        """Answer with the items that this node holds of each key, and the nodes it knows near to each key or id."""
        body: Find = request.body
        self._called(request, body.sender)
        now = trio.current_time()
        reply = ReplyBuilder(self._peers.contact.key, self._config.limits.max_record)
        for query in body.queries():
            items: Mapping[str | None, Item] = {}
            size = 0
            if isinstance(query, str):
                target, items, size = key_id(query), self._storage.get(query, now), self._storage.size_of(query)
            else:
                target = int.from_bytes(query, "big")
            reply.add(self._peers.nearest_for(body.sender, target, self._config.k), items, size, now)
        return Reply(reply.build())

    def rpc_store(self, request: Request) -> Reply:
        """Store items. Answers for each why it was refused, if it was."""
        body: Store = request.body
        self._called(request, body.sender)
        if sum(len(record.items) for record in body.records) > MAX_ENTRIES:
            raise BadRequest(f"over {MAX_ENTRIES} items in one call")
        now = trio.current_time()
        publisher = request.peer.key or (body.sender.key if body.sender is not None else request.peer.route)
        refusals = []
        for record in body.records:
            for wire in record.items:
                item = from_wire(wire, now, self._republish_at())
                if item.role is Role.CACHED:
                    item.expires_at = min(item.expires_at, now + self._config.cache_ttl)
                refusals.append(self._storage.put(record.key, wire.subkey, item, now, publisher) or "")
        return Reply(StoreReply(self._peers.contact.key, refusals))

    def _called(self, request: Request, sender: Contact | None) -> None:
        self.served += 1
        self._peers.called_by(request, None if sender is None else intern_contact(sender))
