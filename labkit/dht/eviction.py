"""Eviction, or who gives way when a DHT node is full: of whoever has most, what expires first. Plain state, no I/O.

A node is full when it holds as many keys or bytes as its limits say, and a record when it holds as many subkeys or
bytes. Then something is dropped for what is new. If that were simply what expires first of all, one peer that stores
rubbish with long times to live would flush everybody. So each publisher has a share, and whoever has the largest gives
up what expires first of its own; if that is whoever stores now, the new item itself may be that. A peer that stays
below an equal share never loses anything to others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Protocol

MAX_LOOKS = 64  # items that are looked at for one that frees a key; entries that a heap may have too many
QUEUE_LENGTH = 256  # items of a full record that one scan of it finds
SCAN_PERIOD = 1.0  # seconds between two scans of a full record

Publisher = bytes | None  # None: this node itself, whose items are dropped for nobody


class Holding(Protocol):
    """An item of the storage, as far as it matters here."""

    expires_at: float
    publisher: Publisher
    number: int

    def size(self, subkey: str | None) -> int: ...


ItemsAt = Callable[[str], Mapping[str | None, Holding]]  # the items of a key


class Amounts:
    """How much each publisher has of something, and who has most."""

    __slots__ = ("_heap", "_of")

    def __init__(self) -> None:
        self._of: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []  # (-amount, publisher); some have less by now, and then stand too high

    def add(self, publisher: Publisher, amount: int) -> None:
        """Add to what a publisher has, or take from it."""
        if publisher is None:
            return
        now = self._of.get(publisher, 0) + amount
        if now <= 0:
            self._of.pop(publisher, None)
            return
        self._of[publisher] = now
        if amount > 0:
            heapq.heappush(self._heap, (-now, publisher))
            if len(self._heap) > 2 * len(self._of) + MAX_LOOKS:
                self._heap = [(-amount, publisher) for publisher, amount in self._of.items()]
                heapq.heapify(self._heap)

    def gives_way(self, publisher: Publisher, growth: int) -> Publisher:
        """Returns who has most, or `publisher` if it would have as much with so much more; None for nobody."""
        heap = self._heap
        while heap and -heap[0][0] != (actual := self._of.get(heap[0][1], 0)):
            if actual:
                heapq.heapreplace(heap, (-actual, heap[0][1]))
            else:
                heapq.heappop(heap)
        if publisher is not None and (not heap or -heap[0][0] <= self._of.get(publisher, 0) + growth):
            return publisher
        return heap[0][1] if heap else None


class Shares:
    """The shares of a whole node."""

    __slots__ = ("_heaps", "_items", "_keys", "_sizes")

    def __init__(self) -> None:
        self._sizes = Amounts()  # bytes
        self._keys = Amounts()  # records that it has begun
        self._items: dict[bytes, int] = {}
        # (expiration, number, key, subkey) of each item, and of some that are gone. An item that was prolonged stands
        # where it was, until it is looked at.
        self._heaps: dict[bytes, list[tuple[float, int, str, str | None]]] = {}

    def count_key(self, publisher: Publisher, keys: int) -> None:
        """Count a new record (1), or one that is gone (-1)."""
        self._keys.add(publisher, keys)

    def count(self, publisher: Publisher, size: int) -> None:
        """Count an item of so many bytes, or, if they are negative, one that is gone."""
        if publisher is None:
            return
        self._sizes.add(publisher, size)
        items = self._items.get(publisher, 0) + (1 if size > 0 else -1)
        if items:
            self._items[publisher] = items
        else:
            del self._items[publisher]
            self._heaps.pop(publisher, None)

    def remember(self, key: str, subkey: str | None, item: Holding, items_at: ItemsAt) -> None:
        """Take note of a new item that was counted; it may be dropped later. `items_at` returns the items of a key."""
        if item.publisher is None:
            return
        heap = self._heaps.setdefault(item.publisher, [])
        heapq.heappush(heap, (item.expires_at, item.number, key, subkey))
        if len(heap) > 2 * self._items[item.publisher] + MAX_LOOKS:  # most of them are gone
            heap[:] = [e for e in heap if (held := items_at(e[2]).get(e[3])) is not None and held.number == e[1]]
            heapq.heapify(heap)

    def victim(self, items_at: ItemsAt, new: Holding, growth: int, *, keys: bool) -> tuple[str, str | None] | None:
        """Returns the key and subkey of an item to drop for a new one, or None if the new one has to go.

        Args:
            items_at: Returns the items of a key.
            new: The new item.
            growth: Its size, bytes.
            keys: Whether a key has to become free, rather than bytes.
        """
        amounts = self._keys if keys else self._sizes
        publisher = amounts.gives_way(new.publisher, 1 if keys else growth)
        heap = self._heaps.get(publisher, []) if publisher is not None else []
        looked: list[tuple[float, int, str, str | None]] = []
        found: tuple[str, str | None] | None = None
        while heap and len(looked) < MAX_LOOKS:
            expires_at, number, key, subkey = heap[0]
            items = items_at(key)
            item = items.get(subkey)
            if item is None or item.number != number:
                heapq.heappop(heap)  # it is gone
            elif item.expires_at > expires_at:
                heapq.heapreplace(heap, (item.expires_at, number, key, subkey))
            elif publisher == new.publisher and item.expires_at >= new.expires_at:
                break  # the new one expires first
            elif keys and len(items) > 1:
                looked.append(heapq.heappop(heap))
            else:
                found = key, subkey
                break
        for entry in looked:
            heapq.heappush(heap, entry)
        return found


class RecordShares:
    """The shares of one record."""

    __slots__ = ("_queued_at", "_queues", "_sizes")

    def __init__(self) -> None:
        self._sizes = Amounts()
        self._queues: dict[bytes, list[tuple[str | None, int]]] = {}  # what expires first, last in the list
        self._queued_at: dict[bytes, float] = {}

    def count(self, publisher: Publisher, size: int) -> None:
        """Count an item of so many bytes, or, if they are negative, one that is gone."""
        self._sizes.add(publisher, size)

    def victim(
        self, items: Mapping[str | None, Holding], new: Holding, growth: int, subkey: str | None, now: float
    ) -> str | None:
        """Returns the subkey of an item to drop for a new one, or None if the new one has to go.

        A record is looked through once a second at most for each that has most, so that items which are refused cost
        next to nothing.
        """
        publisher = self._sizes.gives_way(new.publisher, growth)
        if publisher is None:
            return None
        queue = self._queues.get(publisher, [])
        if not queue and now >= self._queued_at.get(publisher, float("-inf")) + SCAN_PERIOD:
            self._forget_old(now)
            theirs = ((item.expires_at, item.number, s) for s, item in items.items() if item.publisher == publisher)
            first = heapq.nsmallest(QUEUE_LENGTH, theirs, key=lambda entry: entry[:2])
            self._queued_at[publisher] = now
            queue = self._queues[publisher] = [(s, number) for _, number, s in reversed(first)]
        while queue:
            other, number = queue[-1]
            item = items.get(other)
            if item is None or item.number != number or other == subkey:
                queue.pop()
            elif publisher == new.publisher and item.expires_at >= new.expires_at:
                return None
            else:
                queue.pop()
                return other
        return None

    def _forget_old(self, now: float) -> None:
        for publisher in [p for p, at in self._queued_at.items() if now >= at + SCAN_PERIOD]:
            del self._queued_at[publisher], self._queues[publisher]
