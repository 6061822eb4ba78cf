"""The nodes that a DHT node knows: the routing table of k-buckets, and the blacklist of nodes that did not answer.

On a batch's way, when beam search misses its cache, a look-up starts from the contacts nearest to a key. Plain state,
no I/O: the time is passed in, and the table *returns* the node to ping rather than pinging it.
Source: Kademlia, sections 2.1 to 2.4 (k-buckets, splitting), 4.1 (replacement cache, stale contacts).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from random import Random

from labkit.contact import ID_BITS, Contact


class KBucket:
    """Up to k contacts whose ids are in [low, low + 2**bits), the least recently seen first."""

    __slots__ = ("bits", "contacts", "looked_up_at", "low", "probed_at", "replacements")

    def __init__(self, low: int, bits: int, looked_up_at: float) -> None:
        self.low = low
        self.bits = bits
        self.contacts: dict[int, Contact] = {}
        self.replacements: dict[int, Contact] | None = None  # seen while the bucket was full, the latest last
        self.looked_up_at = looked_up_at  # when an id of this range was last looked up
        self.probed_at = float("-inf")  # when the table last asked for a ping of the least recently seen

    def covers(self, node_id: int) -> bool:
        """Whether an id is in this range."""
        return node_id >> self.bits == self.low >> self.bits

    def distance(self, target: int) -> int:
        """Returns the smallest XOR distance to `target` that an id of this range can have."""
        return ((self.low ^ target) >> self.bits) << self.bits

    def random_id(self, random: Random) -> int:
        """Returns an id of this range, to look up when the bucket is refreshed."""
        return self.low | random.getrandbits(self.bits) if self.bits else self.low


class RoutingTable:
    """The contacts that a node has heard from directly, in k-buckets that split around its own id.

    A full bucket that covers the node's own id splits. Any other keeps its contacts, because a node that has been up
    for long is likely to stay up (Kademlia, section 2.1). A newcomer then waits in the bucket's replacement cache, and
    `seen` returns the least recently seen contact for the caller to ping, at most one per bucket and `probe_period`.

    Args:
        node_id: The node's own id.
        k: How many contacts a bucket holds.
        probe_period: Seconds.
    """

    __slots__ = ("_lows", "buckets", "k", "node_id", "probe_period")

    def __init__(self, node_id: int, k: int = 20, *, probe_period: float = 5.0) -> None:
        self.node_id = node_id
        self.k = k
        self.probe_period = probe_period
        self.buckets = [KBucket(0, ID_BITS, float("-inf"))]  # sorted by range; together they cover every id
        self._lows = [0]  # where each begins

    def __len__(self) -> int:
        return sum(len(bucket.contacts) for bucket in self.buckets)

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._bucket(node_id).contacts

    def get(self, node_id: int) -> Contact | None:
        """Returns the contact of a node; None if it is not known."""
        return self._bucket(node_id).contacts.get(node_id)

    def __iter__(self) -> Iterator[Contact]:
        for bucket in self.buckets:
            yield from bucket.contacts.values()

    def seen(self, contact: Contact, now: float) -> Contact | None:
        """Note that `contact` answered or called. Returns a contact to ping if its bucket is full, else None."""
        node_id = contact.node_id
        if node_id == self.node_id:
            return None
        bucket = self._bucket(node_id)
        while True:
            contacts = bucket.contacts
            if node_id in contacts:
                del contacts[node_id]  # to the end: the most recently seen
            if len(contacts) < self.k:
                contacts[node_id] = contact
                if bucket.replacements:
                    bucket.replacements.pop(node_id, None)
                return None
            if not bucket.covers(self.node_id) or bucket.bits == 0:
                break
            self._split(bucket)
            bucket = self._bucket(node_id)
        replacements = bucket.replacements = bucket.replacements or {}
        replacements.pop(node_id, None)
        replacements[node_id] = contact
        if len(replacements) > self.k:
            del replacements[next(iter(replacements))]
        if now - bucket.probed_at < self.probe_period:
            return None
        bucket.probed_at = now
        return next(iter(bucket.contacts.values()))

    def failed(self, node_id: int) -> None:
        """Note that a node did not answer: a newcomer from the replacement cache takes its place.

        If there is none, the contact stays (section 4.1), so that a short outage of our own network does not empty the
        table. The blacklist keeps the node from being asked; `remove` is for when it has failed too often.
        """
        bucket = self._bucket(node_id)
        if bucket.replacements:
            bucket.replacements.pop(node_id, None)
        if bucket.replacements and bucket.contacts.pop(node_id, None) is not None:
            newcomer_id, newcomer = bucket.replacements.popitem()
            bucket.contacts[newcomer_id] = newcomer

    def remove(self, node_id: int) -> Contact | None:
        """Forget a node. Returns its contact if it was known."""
        bucket = self._bucket(node_id)
        if bucket.replacements:
            bucket.replacements.pop(node_id, None)
        return bucket.contacts.pop(node_id, None)

    def nearest(self, target: int, count: int, accept: Callable[[Contact], bool] | None = None) -> list[Contact]:
        """Returns up to `count` contacts by growing XOR distance to `target`, without those that `accept` rejects."""
        found: list[Contact] = []
        # The ranges are aligned powers of two, so whole buckets follow one another in distance.
        for bucket in sorted(self.buckets, key=lambda bucket: bucket.distance(target)):
            for node_id in sorted(bucket.contacts, key=target.__xor__):
                contact = bucket.contacts[node_id]
                if accept is None or accept(contact):
                    found.append(contact)
                    if len(found) == count:
                        return found
        return found

    def looked_up(self, target: int, now: float) -> None:
        """Note that `target` was looked up: its bucket needs no refresh for a while."""
        self._bucket(target).looked_up_at = now

    def stale(self, now: float, period: float) -> list[KBucket]:
        """Returns the buckets in whose range nothing was looked up for `period` seconds (section 2.3)."""
        return [bucket for bucket in self.buckets if now - bucket.looked_up_at >= period]

    def _bucket(self, node_id: int) -> KBucket:
        return self.buckets[bisect_right(self._lows, node_id) - 1]

    def _split(self, bucket: KBucket) -> None:
        """Replace a bucket by two halves. (It covers our own id, so its replacement cache is empty.)"""
        bits = bucket.bits - 1
        halves = [KBucket(low, bits, bucket.looked_up_at) for low in (bucket.low, bucket.low | 1 << bits)]
        for node_id, contact in bucket.contacts.items():
            halves[node_id >> bits & 1].contacts[node_id] = contact
        index = self.buckets.index(bucket)
        self.buckets[index : index + 1] = halves
        self._lows = [bucket.low for bucket in self.buckets]


class Blacklist:
    """Nodes that did not answer. Each is left alone for a back-off time that doubles with every failure in a row.

    Args:
        base: The first back-off, seconds.
        longest: The longest back-off, seconds.
        capacity: How many nodes are remembered.
    """

    __slots__ = ("_entries", "base", "capacity", "longest")

    def __init__(self, base: float = 1.0, longest: float = 60.0, capacity: int = 4096) -> None:
        self.base = base
        self.longest = longest
        self.capacity = capacity
        self._entries: dict[int, tuple[int, float]] = {}  # node id -> failures in a row, end of the back-off

    def __contains__(self, node_id: int) -> bool:
        return node_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def failed(self, node_id: int, now: float, *, again: bool = True) -> int:
        """Note a failure. Returns how many there were in a row so far.

        Calls that were in flight together count once: a failure during the back-off does not lengthen it. Nor does one
        count more than the first if it is none of the node's (`again` is false).
        """
        failures, until = self._entries.pop(node_id, (0, now))
        if now >= until:
            failures = failures + 1 if again else 1
            until = now + min(self.longest, self.base * 2.0 ** min(failures - 1, 64))
        self._entries[node_id] = failures, until
        if len(self._entries) > self.capacity:
            del self._entries[next(iter(self._entries))]
        return failures

    def clear(self, node_id: int) -> None:
        """Note that a node has answered."""
        self._entries.pop(node_id, None)

    def forgive(self) -> None:
        """Forget all failures: they were our own."""
        self._entries.clear()

    def blocks(self, node_id: int, now: float) -> bool:
        """Whether a node is to be left alone now. When its back-off is over it may be tried again."""
        entry = self._entries.get(node_id)
        return entry is not None and now < entry[1]

    def count(self, now: float) -> int:
        """Returns how many nodes are left alone now."""
        return sum(now < until for _, until in self._entries.values())

    def forget(self, now: float) -> None:
        """Drop the entries whose back-off ended long ago."""
        for node_id in [n for n, (_, until) in self._entries.items() if now - until > 10 * self.longest]:
            del self._entries[node_id]
