"""The background work of a DHT node: joining and rejoining, refreshing buckets, expiring and republishing records.

One loop per node, with jittered ticks, so that nodes do not act in step. Everything here may fail in part; a later tick
makes it good. Source: Kademlia, sections 2.3 (joining, refreshing) and 2.5 (republishing and its optimizations).
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import trio

from labkit.contact import Contact
from labkit.dht.lookup import FindNodes
from labkit.dht.peers import Peers
from labkit.dht.protocol import ID_BYTES, WireItem, batches, to_wire
from labkit.dht.replicas import Replicas
from labkit.dht.routing import KBucket
from labkit.dht.storage import Role, Storage, key_id

FIRST_CONTACTS = 2  # contacts that a newcomer gets for each bucket; calls, in both directions, add more
COME_BACK_ATTEMPTS, COME_BACK_PAUSE = 10, 1.0  # to reach anybody after we were away; seconds between two
TOLD_AT_ONCE = 16  # nodes that are told at the same time where we are now
KEYS_PER_TURN = 256  # keys to look at before other tasks get a turn


class Maintenance:
    """What a DHT node does unasked.

    Args:
        peers: The other nodes.
        storage: The records that this node holds.
        replicas: Knows on which nodes a record is stored.
        find_nodes: Looks up the nodes nearest to ids.
    """

    __slots__ = ("_find_nodes", "_jitter", "_joined_through", "_peers", "_random", "_replicas", "_storage")

    def __init__(self, peers: Peers, storage: Storage, replicas: Replicas, find_nodes: FindNodes) -> None:
        self._peers = peers
        self._storage = storage
        self._replicas = replicas
        self._find_nodes = find_nodes
        self._random = Random(peers.contact.node_id)
        # Puts republishing off or brings it forward, so that replicas do not act in step. It is the same for all items
        # until the next tick, so that what was stored together is republished together, in few calls.
        self._jitter = self._random.uniform(0.8, 1.2)
        self._joined_through: dict[int, Contact] = {}  # asked again when no other node is left

    async def run(self) -> None:
        """Tick until cancelled."""
        config = self._peers.config
        tick = min(config.republish_period, config.refresh_period) / 4
        while True:
            await trio.sleep(tick * self._random.uniform(0.75, 1.25))
            now = trio.current_time()
            self._jitter = self._random.uniform(0.8, 1.2)
            self._storage.expire(now)
            self._peers.blacklist.forget(now)
            if len(self._peers.routing):
                await self._look_for_lost()
            else:
                await self._rejoin()
            await self._refresh(now)
            await self._republish()

    # ------------------------------------------------------------ the routing table

    async def join(self, contacts: Iterable[Contact]) -> int:
        """Join the network of `contacts`. Returns how many of them answered.

        1. Ping them. 2. Look up our own id, which also makes us known to our neighbours. 3. Get to know a few nodes in
        each bucket that is farther away than the nearest neighbour (section 2.3).
        """
        own_id = self._peers.contact.node_id
        others = [contact for contact in contacts if contact.node_id != own_id]
        self._joined_through |= {contact.node_id: contact for contact in others}
        answered = await self._ping_all(others)  # 1
        if answered:
            await self._find_nodes([own_id])  # 2
            await self._fill_buckets()  # 3
        return answered

    async def _ping_all(self, contacts: Iterable[Contact]) -> int:
        answered = 0

        async def ping(contact: Contact) -> None:
            nonlocal answered
            if await self._peers.ping(contact):
                answered += 1

        async with trio.open_nursery() as nursery:
            for contact in {contact.node_id: contact for contact in contacts}.values():
                nursery.start_soon(ping, contact)
        return answered

    async def come_back(self, contact: Contact) -> None:
        """Find back to the other nodes after our machine was away, by those that we knew; then tell all where we are.

        Its network may be there a moment later than its address, so it is tried several times.
        """
        peers = self._peers
        for _ in range(COME_BACK_ATTEMPTS):
            before = {**self._joined_through, **peers.lost}
            known = peers.routing.nearest(peers.contact.node_id, peers.config.alpha)
            if await self._ping_all([*before.values(), *known]) or contact != peers.contact:
                break
            peers.blacklist.forgive()
            await trio.sleep(COME_BACK_PAUSE)
        await self.tell_all(contact)

    async def tell_all(self, contact: Contact) -> None:
        """Tell all nodes that we know, and our neighbours among the others, that we are at `contact` now."""
        peers, own_id = self._peers, self._peers.contact.node_id
        told = trio.CapacityLimiter(TOLD_AT_ONCE)

        async def tell(other: Contact) -> None:
            async with told:
                if contact == peers.contact:  # else we have moved on, and tell that instead
                    await peers.tell(other)

        async with trio.open_nursery() as nursery:
            for other in peers.routing.nearest(own_id, len(peers.routing)):
                nursery.start_soon(tell, other)
        if contact == peers.contact:
            await self._find_nodes([own_id])

    async def _fill_buckets(self) -> None:
        """Get to know a few nodes in each bucket that is farther away than the nearest neighbour.

        Such a bucket only leads on to nodes that know more, so a few contacts are enough. To look up an id in each
        bucket would be most of the work of joining.
        """
        routing, own_id = self._peers.routing, self._peers.contact.node_id
        nearest = routing.nearest(own_id, 1)
        if len(routing) < routing.k or not nearest:
            return  # there is one bucket, which looking up our own id has filled
        now = trio.current_time()
        async with trio.open_nursery() as nursery:
            for bucket in routing.buckets:
                if not bucket.covers(nearest[0].node_id) and not bucket.covers(own_id):
                    bucket.looked_up_at = now
                    if len(bucket.contacts) < FIRST_CONTACTS:
                        nursery.start_soon(self._fill, bucket)

    async def _fill(self, bucket: KBucket) -> None:
        """1. Ask a node in the bucket, or near to it, which nodes it knows there. 2. Ping as many as we lack."""
        target = bucket.random_id(self._random)
        for contact in self._peers.nearest(target, 1):
            answers = await self._peers.call_find(contact, [target.to_bytes(ID_BYTES, "big")])  # 1
            named = answers[0].contacts if answers else ()
            new = [other for other in named if bucket.covers(other.node_id) and other.node_id not in bucket.contacts]
            async with trio.open_nursery() as nursery:
                for other in new[: max(0, FIRST_CONTACTS - len(bucket.contacts))]:
                    nursery.start_soon(self._peers.ping, other)  # 2

    async def _refresh(self, now: float) -> None:
        """Look up an id in each bucket in which nothing was looked up for a while."""
        peers = self._peers
        stale = peers.routing.stale(now, peers.config.refresh_period * self._random.uniform(0.8, 1.0))
        if stale and len(peers.routing):
            await self._find_nodes([bucket.random_id(self._random) for bucket in stale])

    async def _rejoin(self) -> None:
        """Join again, through nodes that we lost or joined through, even if blacklisted. The routing table is empty."""
        await self.join([*self._joined_through.values(), *self._peers.lost.values()])

    async def _look_for_lost(self) -> None:
        """Ping a few of the nodes that we lost or joined through.

        If the network was divided and is whole again, no node that is known on one side knows any on the other. The
        first that answers leads to all.
        """
        peers = self._peers
        lost = {**self._joined_through, **peers.lost}
        away = [contact for node_id, contact in lost.items() if node_id not in peers.routing]
        before = len(peers.routing)
        async with trio.open_nursery() as nursery:
            for contact in self._random.sample(away, min(peers.config.alpha, len(away))):
                nursery.start_soon(peers.ping, contact)
        if away and len(peers.routing) > before:
            await self._find_nodes([peers.contact.node_id])
            await self._fill_buckets()

    # ------------------------------------------------------------ records

    def republish_at(self) -> float:
        """Returns when an item that is stored now is due to be republished."""
        return trio.current_time() + self._peers.config.republish_period * self._jitter

    async def _republish(self) -> None:
        """Store the items that are due on the k nearest nodes.

        An item is due if no node has stored it here for a `republish_period`: the first of its k replicas to republish
        it spares the others from doing so. The routing table knows our own neighbourhood well enough to need no
        look-up. A node that is no longer among the k nearest gives its copy to the `alpha` nearest once, and keeps a
        spare.
        """
        peers = self._peers
        outgoing: dict[Contact, list[tuple[str, WireItem]]] = {}
        for index, key in enumerate(list(self._storage)):
            if index % KEYS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
            now = trio.current_time()
            items = self._storage.get(key, now)
            due = [(s, i) for s, i in items.items() if i.republish_at <= now and i.role is not Role.CACHED]
            if not due:
                continue
            target = key_id(key)
            contacts, here = self._replicas.among(target, peers.nearest(target, peers.config.k))
            if not here:
                contacts = contacts[: peers.config.alpha]
            rows = [(key, to_wire(subkey, item, now)) for subkey, item in due if here or item.role is Role.REPLICA]
            for contact in contacts:
                outgoing.setdefault(contact, []).extend(rows)
            for _, item in due:
                item.republish_at = self.republish_at()
                item.role = Role.REPLICA if here or not contacts else Role.SPARE
        async with trio.open_nursery() as nursery:
            for contact, rows in outgoing.items():
                nursery.start_soon(self._store_at, contact, rows)

    async def hand_over(self, newcomer: Contact) -> None:
        """Give a newly seen node the records that belong to it: it is among the k nearest to their keys.

        Of the nodes that hold a record only the nearest does so (section 2.5), so that a newcomer gets it once. The
        node that stored an item itself does so, too: if two nodes join at the same time, one may store the item before
        it knows the other, and the nearest node may have met the other before it got the item.
        """
        peers = self._peers
        rows: list[tuple[str, WireItem]] = []
        for index, key in enumerate(list(self._storage)):
            if index % KEYS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
            target = key_id(key)
            nearest = peers.nearest(target, peers.config.k)
            others = [contact for contact in nearest if contact.node_id != newcomer.node_id]
            if len(others) == len(nearest):
                continue
            we_are_nearest = not others or peers.contact.node_id ^ target < others[0].node_id ^ target
            now = trio.current_time()
            for subkey, item in self._storage.get(key, now).items():
                if item.ours or (we_are_nearest and item.role is not Role.CACHED):
                    rows.append((key, to_wire(subkey, item, now)))
        await self._store_at(newcomer, rows)

    async def _store_at(self, contact: Contact, rows: list[tuple[str, WireItem]]) -> None:
        for records in batches(rows):
            if await self._peers.call_store(contact, records) is None:
                return
