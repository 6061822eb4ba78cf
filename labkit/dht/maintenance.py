"""What a DHT node does unasked: expire and republish records, hand them to newcomers, refresh buckets, find back.

One loop per node, its ticks jittered, so that nodes do not act in step. Everything here may fail in part and is made
good by a later tick. Source: Kademlia, sections 2.3 (refresh) and 2.5 (republishing and its restrictions).
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING

import trio

from labkit.contact import Contact
from labkit.dht.protocol import ID_BYTES, WireItem, batches, to_wire
from labkit.dht.routing import KBucket
from labkit.dht.storage import Role, key_id

if TYPE_CHECKING:
    from labkit.dht.node import DHTNode

FEW = 2  # contacts of a bucket that a newcomer begins with; who calls it and whom it calls add to them
_KEYS_AT_A_TIME = 256  # then other tasks get a turn


class Maintenance:
    """The background work of `node`."""

    __slots__ = ("_bootstrap", "_node", "_random", "jitter")

    def __init__(self, node: DHTNode) -> None:
        self._node = node
        self._random = Random(node.contact.node_id)
        # By what republishing is put off or brought forward, so that replicas do not act in step. The same for all
        # items until the next tick, so that what was stored together is republished together, in few calls.
        self.jitter = self._random.uniform(0.8, 1.2)
        self._bootstrap: dict[int, Contact] = {}  # whom we joined through: asked again when nobody is left

    async def run(self) -> None:
        """Tick until cancelled."""
        config = self._node.config
        tick = min(config.republish_period, config.refresh_period) / 4
        while True:
            await trio.sleep(tick * self._random.uniform(0.75, 1.25))
            now = trio.current_time()
            self.jitter = self._random.uniform(0.8, 1.2)
            self._node.storage.expire(now)
            self._node.peers.blacklist.forget(now)
            if len(self._node.routing):
                await self._look_for_lost()
            else:
                await self._find_back()
            await self._refresh(now)
            await self.republish()

    # ------------------------------------------------------------ the routing table

    async def ping_all(self, contacts: Iterable[Contact]) -> int:
        """Ping nodes and remember them. Returns how many answered."""
        answered = 0

        async def ping(contact: Contact) -> None:
            nonlocal answered
            if await self._node.peers.ping(contact):
                answered += 1

        async with trio.open_nursery() as nursery:
            for contact in {contact.node_id: contact for contact in contacts}.values():
                self._bootstrap[contact.node_id] = contact
                nursery.start_soon(ping, contact)
        return answered

    async def fill_buckets(self) -> None:
        """Get to know a few nodes in each bucket that is farther away than the nearest neighbour. Such a bucket only
        leads on to where others know more, so a few do; and to look up an id in each would be most of joining."""
        node = self._node
        routing = node.routing
        nearest = routing.nearest(node.contact.node_id, 1)
        if len(routing) < routing.k or not nearest:
            return  # one bucket: looking up ourselves has filled it
        now = trio.current_time()
        async with trio.open_nursery() as nursery:
            for bucket in routing.buckets:
                if not bucket.covers(nearest[0].node_id) and not bucket.covers(node.contact.node_id):
                    bucket.looked_up_at = now
                    if len(bucket.contacts) < FEW:
                        nursery.start_soon(self._fill, bucket)

    async def _fill(self, bucket: KBucket) -> None:
        """1. Ask a node in it, or near to it, whom it knows there. 2. Ping as many as we lack."""
        node, target = self._node, bucket.random_id(self._random)
        for contact in node.peers.nearest(target, 1):
            answers = await node.call_find(contact, [target.to_bytes(ID_BYTES, "big")])  # 1
            named = answers[0].contacts if answers else ()
            new = [other for other in named if bucket.covers(other.node_id) and other.node_id not in bucket.contacts]
            async with trio.open_nursery() as nursery:
                for other in new[: max(0, FEW - len(bucket.contacts))]:
                    nursery.start_soon(node.peers.ping, other)  # 2

    async def _refresh(self, now: float) -> None:
        """Look up an id in each bucket where nothing was looked up for a while."""
        node = self._node
        stale = node.routing.stale(now, node.config.refresh_period * self._random.uniform(0.8, 1.0))
        if stale and len(node.routing):
            await node.find_nodes([bucket.random_id(self._random) for bucket in stale])

    async def _find_back(self) -> None:
        """Nobody is left in the routing table: try those we lost and those we joined through, blacklisted or not."""
        await self._node.bootstrap([*self._bootstrap.values(), *self._node.peers.lost.values()])

    async def _look_for_lost(self) -> None:
        """Ping a few of those that we lost or joined through. If the network was parted and is one again, nobody who
        is known on one side knows anybody on the other; the first who answers leads to all."""
        node = self._node
        lost = {**self._bootstrap, **node.peers.lost}
        away = [contact for node_id, contact in lost.items() if node_id not in node.routing]
        before = len(node.routing)
        async with trio.open_nursery() as nursery:
            for contact in self._random.sample(away, min(node.config.alpha, len(away))):
                nursery.start_soon(node.peers.ping, contact)
        if away and len(node.routing) > before:
            await node.find_nodes([node.contact.node_id])
            await self.fill_buckets()

    # ------------------------------------------------------------ records

    async def republish(self) -> None:
        """Give the items that are due to the k nearest nodes.

        An item is due if nobody has stored it here for a `republish_period`: of its k replicas the first to republish
        spares the others from doing so. The routing table knows our own neighbourhood well enough to need no look-up.
        A node that is no longer among the k nearest gives its copy to the `alpha` nearest once, and keeps a spare.
        """
        node = self._node
        outgoing: dict[Contact, list[tuple[str, WireItem]]] = {}
        for index, key in enumerate(list(node.storage)):
            if index % _KEYS_AT_A_TIME == 0:
                await trio.lowlevel.checkpoint()
            now = trio.current_time()
            items = node.storage.get(key, now)
            due = [(s, i) for s, i in items.items() if i.republish_at <= now and i.role is not Role.CACHED]
            if not due:
                continue
            target = key_id(key)
            contacts, here = node.replicas.among(target, node.peers.nearest(target, node.config.k))
            if not here:
                contacts = contacts[: node.config.alpha]
            rows = [(key, to_wire(subkey, item, now)) for subkey, item in due if here or item.role is Role.REPLICA]
            for contact in contacts:
                outgoing.setdefault(contact, []).extend(rows)
            for _, item in due:
                item.republish_at = node.republish_at()
                item.role = Role.REPLICA if here or not contacts else Role.SPARE
        async with trio.open_nursery() as nursery:
            for contact, rows in outgoing.items():
                nursery.start_soon(self._send, contact, rows)

    async def hand_over(self, newcomer: Contact) -> None:
        """Give a newly seen node the records that it is among the k nearest to.

        Of the nodes that hold a record only the nearest does so (section 2.5), so that a newcomer gets it once. And who
        stored an item itself: of two nodes that join at the same time, one may store before it knows the other, and the
        nearest may have met that one before it got the item.
        """
        node = self._node
        rows: list[tuple[str, WireItem]] = []
        for index, key in enumerate(list(node.storage)):
            if index % _KEYS_AT_A_TIME == 0:
                await trio.lowlevel.checkpoint()
            target = key_id(key)
            nearest = node.peers.nearest(target, node.config.k)
            others = [contact for contact in nearest if contact.node_id != newcomer.node_id]
            if len(others) == len(nearest):
                continue
            are_nearest = not others or node.contact.node_id ^ target < others[0].node_id ^ target
            now = trio.current_time()
            for subkey, item in node.storage.get(key, now).items():
                if item.ours or (are_nearest and item.role is not Role.CACHED):
                    rows.append((key, to_wire(subkey, item, now)))
        await self._send(newcomer, rows)

    async def _send(self, contact: Contact, rows: list[tuple[str, WireItem]]) -> None:
        for records in batches(rows):
            if await self._node.call_store(contact, records) is None:
                return
