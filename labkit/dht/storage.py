"""The records that a DHT node holds, with expirations, merged on store, and bounded in every size a peer can choose.

A key's record is either one plain value or a dictionary of subkeys, each with its own expiration (the prefix index that
beam search reads is such a dictionary). A node that is full drops what expires first to make room for what is new; see
`eviction`. Plain state: the time is passed in. Times are on the local clock; between nodes an expiration travels as the
time to live that is left, since volunteers' clocks are wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from labkit.contact import ID_BITS
from labkit.dht.eviction import Publisher, RecordShares, Shares

SCAN_PERIOD = 1.0  # seconds between two scans of all records for expired ones, while a node is full
COUNT_FROM = 16  # a node that has reached this part of a limit counts who has how much
ITEM_OVERHEAD = 200  # bytes counted for an item beside its own, so that empty values are not free


def key_id(key: str) -> int:
    """Returns the 160-bit id of a key: the place of its record in the id space."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=ID_BITS // 8).digest(), "big")


@dataclass(frozen=True, slots=True)
class Entry:
    """Something to store.

    Of the entries of one key and subkey the one with the higher `sequence` wins, then the later expiration, then the
    larger bytes.

    Args:
        key: The key to find it by.
        value: The bytes to store.
        ttl: Time to live, seconds.
        subkey: With one, this is an entry of the key's dictionary.
        sequence: A number that grows with each new value.
        owner: An Ed25519 public key; only the same owner can replace the entry. Set by `Signer.sign`.
        signature: The owner's; set by `Signer.sign`.
    """

    key: str
    value: bytes
    ttl: float
    subkey: str | None = None
    sequence: int = 0
    owner: bytes | None = None
    signature: bytes | None = None


@dataclass(frozen=True, slots=True)
class Value:
    """A value that was found. `expires_at` is on trio's clock of this process, in seconds."""

    data: bytes
    expires_at: float


class Role(IntEnum):
    """Why a node holds an item."""

    REPLICA = 0  # the node is, or was, among the k nearest, and republishes the item
    SPARE = 1  # nearer nodes have been given the item; the node republishes it if it is among the nearest again
    CACHED = 2  # a look-up left the item on its way: it is short-lived and never republished


@dataclass(slots=True)
class Item:
    """One value as it is held: a plain record, or one subkey of a dictionary. Times are on the local clock."""

    value: bytes
    expires_at: float
    sequence: int = 0
    owner: bytes | None = None
    signature: bytes | None = None
    role: Role = Role.REPLICA
    republish_at: float = float("inf")
    ours: bool = False  # whether this node stored it, rather than another
    publisher: Publisher = None  # whose share of the room it takes, set by `Storage.put`
    number: int = 0  # names the item, set by `Storage.put`

    def size(self, subkey: str | None) -> int:
        """Returns the size that is counted for the item, in bytes: a little more than it takes on the wire."""
        return ITEM_OVERHEAD + len(self.value) + (len(subkey.encode()) if subkey else 0)

    def same_payload(self, other: Item) -> bool:
        """Whether both are copies of the same value, stored once."""
        return self.value == other.value and self.sequence == other.sequence and self.owner == other.owner


class Comparable(Protocol):
    """What `supersedes` compares: an `Item`, or a `Version`."""

    @property
    def sequence(self) -> int: ...
    @property
    def expires_at(self) -> float: ...
    @property
    def value(self) -> bytes: ...
    @property
    def owner(self) -> bytes | None: ...


def supersedes(new: Comparable, old: Comparable) -> bool:
    """Whether `new` replaces `old`, a value of the same key and subkey.

    Nodes that see the same items in different orders end up with the same one, except if a key has two owners: then the
    first one stays.
    """
    if new.owner != old.owner:
        return old.owner is None
    return (new.sequence, new.expires_at, new.value) > (old.sequence, old.expires_at, old.value)


Verify = Callable[[str, str | None, Item], bool]  # key, subkey, signed item -> whether its signature holds
IsGenuine = Callable[[str, str | None, bytes, int], bool]  # key, subkey, value, sequence -> whether to believe it


def anything(key: str, subkey: str | None, value: bytes, sequence: int) -> bool:
    """An `IsGenuine` that believes everything."""
    return True


@dataclass(frozen=True, slots=True)
class Limits:
    """What a node stores at most. Sizes are in bytes, times in seconds."""

    max_key: int = 512
    max_subkey: int = 256
    max_value: int = 64 * 1024
    max_subkeys: int = 8192
    max_record: int = 4 * 1024 * 1024  # also the size of a find reply, so that each record fits into one
    max_keys: int = 65_536
    max_bytes: int = 256 * 1024 * 1024
    max_ttl: float = 24 * 3600.0

    def problem(self, key: str, subkey: str | None, value: bytes, ttl: float) -> str | None:
        """Returns the reason why such an entry cannot be stored, or None."""
        if not 0 < _utf8(key) <= self.max_key:
            return f"a key has 1 to {self.max_key} bytes of UTF-8"
        return self.problem_of_item(subkey, value, ttl)

    def problem_of_item(self, subkey: str | None, value: bytes, ttl: float) -> str | None:
        """Returns the same for an item of a key that has been checked."""
        if subkey is not None and not 0 <= _utf8(subkey) <= self.max_subkey:
            return f"a subkey has at most {self.max_subkey} bytes of UTF-8"
        if len(value) > self.max_value:
            return f"the value has {len(value)} bytes; at most {self.max_value}"
        if not 0 < ttl <= self.max_ttl + 0.1:  # refuses NaN, too; 0.1 is for rounding on the way
            return f"ttl={ttl}: over 0 and at most {self.max_ttl:.0f} seconds"
        return None


def _utf8(text: str) -> int:
    """Returns the length in bytes, or -1 for text that UTF-8 cannot encode (lone surrogates)."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return -1


class _Record:
    __slots__ = ("creator", "items", "next_expiry", "shares", "size")

    def __init__(self, creator: Publisher) -> None:
        self.items: dict[str | None, Item] = {}  # a plain value has the subkey None
        self.next_expiry = float("inf")  # the earliest expiration of its items
        self.size = 0
        self.creator = creator  # whose share of the keys it takes
        self.shares: RecordShares | None = None  # once it was full


class Storage:
    """The records of one node.

    Args:
        verify: Checks the signature of an item that has an owner.
        limits: How much is stored.
        is_genuine: Whether an entry is by who it names, for those whose form says that.
    """

    __slots__ = ("_number", "_records", "_scanned_at", "_shares", "is_genuine", "limits", "size", "verify")

    def __init__(self, verify: Verify, limits: Limits | None = None, is_genuine: IsGenuine = anything) -> None:
        self.verify = verify
        self.is_genuine = is_genuine
        self.limits = limits or Limits()
        self.size = 0  # bytes, as `Item.size` counts them
        self._records: dict[str, _Record] = {}
        self._scanned_at = float("-inf")
        self._shares: Shares | None = None  # once there is so much that it matters
        self._number = 0

    def __len__(self) -> int:
        """Returns how many keys are held."""
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def get(self, key: str, now: float) -> Mapping[str | None, Item]:
        """Returns the unexpired items of a key by subkey (a plain value has the subkey None)."""
        record = self._records.get(key)
        if record is None:
            return {}
        self._expire_record(key, record, now)
        return record.items

    def size_of(self, key: str) -> int:
        """Returns the size that is counted for all items of a key, in bytes: see `Item.size`."""
        record = self._records.get(key)
        return 0 if record is None else record.size

    def put(self, key: str, subkey: str | None, item: Item, now: float, publisher: bytes = b"") -> str | None:
        """Store an item. Returns None if it, or another copy of it, is held now, else the reason why not.

        Args:
            key: The key of the record.
            subkey: The subkey, in a dictionary.
            item: The item; those of this node itself (`ours`) are never dropped for others.
            now: The time.
            publisher: Who has sent it, as far as that is known. If there is no room, the publisher that has most of it
                gives some up.
        """
        limits = self.limits
        problem = limits.problem(key, subkey, item.value, item.expires_at - now)
        if problem is not None:
            return problem
        record = self._records.get(key)
        if record is not None:
            self._expire_record(key, record, now)
            record = self._records.get(key)
        held = record.items.get(subkey) if record is not None else None
        if held is not None and held.same_payload(item):  # (the held signature was checked: nothing to verify)
            held.expires_at = max(held.expires_at, item.expires_at)
            held.role = min(held.role, item.role)
            if item.role is not Role.CACHED:
                held.republish_at = item.republish_at  # another node has just republished it: we need not, for a while
            return None
        if held is not None and not supersedes(item, held):
            return "signed by another owner" if item.owner != held.owner else "a later entry is held"
        if (item.owner is not None or item.signature is not None) and not self.verify(key, subkey, item):
            return "the signature does not hold"
        if not self.is_genuine(key, subkey, item.value, item.sequence):
            return "it is not signed by who it names"
        if record is not None and held is None and (subkey is None) != (None in record.items):
            return "the key holds a dictionary" if subkey is None else "the key holds a plain value"
        item.publisher = None if item.ours else publisher
        problem = self._make_room(key, subkey, item, now)
        if problem is not None:
            return problem
        self._insert(key, subkey, item)
        return None

    def expire(self, now: float) -> None:
        """Drop all items that have expired."""
        for key, record in list(self._records.items()):
            self._expire_record(key, record, now)

    # ------------------------------------------------------------ room

    def _make_room(self, key: str, subkey: str | None, item: Item, now: float) -> str | None:
        """Drop items until there is room for a new one. Returns the reason if there can be none.

        1. In its record, for one more subkey and its bytes. 2. In the node, for one more key. 3. In the node, for its
        bytes.
        """
        limits, size = self.limits, item.size(subkey)

        def growth() -> int:
            held = self._items_at(key).get(subkey)
            return size - (held.size(subkey) if held is not None else 0)

        def record_is_full(record: _Record) -> str:
            if subkey not in record.items and len(record.items) >= limits.max_subkeys:
                return f"the dictionary is full ({limits.max_subkeys} subkeys)"
            return (
                f"the record is full ({limits.max_record} bytes)" if record.size + growth() > limits.max_record else ""
            )

        def node_is_full() -> str:
            if key not in self._records and len(self._records) >= limits.max_keys:
                return f"the node is full ({limits.max_keys} keys)"
            return f"the node is full ({limits.max_bytes} bytes)" if self.size + growth() > limits.max_bytes else ""

        while (record := self._records.get(key)) is not None and (problem := record_is_full(record)):
            if record.shares is None:
                record.shares = RecordShares()
                for other, held in record.items.items():
                    record.shares.count(held.publisher, held.size(other))
            victim = record.shares.victim(record.items, item, growth(), subkey, now)  # 1
            if victim is None:
                return problem
            self._drop(key, record, victim)
        if node_is_full() and now >= self._scanned_at + SCAN_PERIOD:  # else each item would cost a scan of everything
            self._scanned_at = now
            self.expire(now)
        while problem := node_is_full():
            keys = key not in self._records and len(self._records) >= limits.max_keys
            place = self._counted().victim(self._items_at, item, growth(), keys=keys)  # 2, 3
            if place is None:
                return problem
            self._drop(place[0], self._records[place[0]], place[1])
        return None

    def _counted(self) -> Shares:
        """The shares of all publishers, counted from here on."""
        if self._shares is None:
            shares = self._shares = Shares()
            for key, record in self._records.items():
                shares.count_key(record.creator, 1)
                for subkey, item in record.items.items():
                    shares.count(item.publisher, item.size(subkey))
                    shares.remember(key, subkey, item, self._items_at)
        return self._shares

    def _items_at(self, key: str) -> Mapping[str | None, Item]:
        record = self._records.get(key)
        return {} if record is None else record.items

    def _insert(self, key: str, subkey: str | None, item: Item) -> None:
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(item.publisher)
            if self._shares is not None:
                self._shares.count_key(item.publisher, 1)
        held = record.items.get(subkey)
        if held is not None:
            self._count(record, held, -held.size(subkey))
        self._number += 1
        item.number = self._number
        record.items[subkey] = item
        record.next_expiry = min(record.next_expiry, item.expires_at)
        self._count(record, item, item.size(subkey))
        if self._shares is not None:
            self._shares.remember(key, subkey, item, self._items_at)
        elif self.size * COUNT_FROM > self.limits.max_bytes or len(self._records) * COUNT_FROM > self.limits.max_keys:
            self._counted()

    def _drop(self, key: str, record: _Record, subkey: str | None) -> None:
        item = record.items.pop(subkey)
        self._count(record, item, -item.size(subkey))
        if not record.items:
            self._forget(key, record)

    def _count(self, record: _Record, item: Item, size: int) -> None:
        record.size += size
        self.size += size
        if record.shares is not None:
            record.shares.count(item.publisher, size)
        if self._shares is not None:
            self._shares.count(item.publisher, size)

    def _forget(self, key: str, record: _Record) -> None:
        del self._records[key]
        if self._shares is not None:
            self._shares.count_key(record.creator, -1)

    def _expire_record(self, key: str, record: _Record, now: float) -> None:
        if now < record.next_expiry:
            return
        for subkey in [subkey for subkey, item in record.items.items() if item.expires_at <= now]:
            item = record.items.pop(subkey)
            self._count(record, item, -item.size(subkey))
        record.next_expiry = min((item.expires_at for item in record.items.values()), default=float("inf"))
        if not record.items:
            self._forget(key, record)
