"""The records that a DHT node holds, with expirations, merged on store, and bounded in every size a peer can choose.

A key's record is either one plain value or a dictionary of subkeys, each with its own expiration (the prefix index that
beam search reads is such a dictionary). Plain state: the time is passed in. Times are on the local clock; between nodes
an expiration travels as the time to live that is left, since volunteers' clocks are wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from labkit.contact import ID_BITS

SCAN_PERIOD = 1.0  # seconds between two scans of all records for expired ones, while a node is full
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
    __slots__ = ("items", "next_expiry", "size")

    def __init__(self) -> None:
        self.items: dict[str | None, Item] = {}  # a plain value has the subkey None
        self.next_expiry = float("inf")  # the earliest expiration of its items
        self.size = 0


class Storage:
    """The records of one node.

    Args:
        verify: Checks the signature of an item that has an owner.
        limits: How much is stored.
    """

    __slots__ = ("_records", "_scanned_at", "limits", "size", "verify")

    def __init__(self, verify: Verify, limits: Limits | None = None) -> None:
        self.verify = verify
        self.limits = limits or Limits()
        self.size = 0  # bytes, as `Item.size` counts them
        self._records: dict[str, _Record] = {}
        self._scanned_at = float("-inf")

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

    def put(self, key: str, subkey: str | None, item: Item, now: float) -> str | None:
        """Store an item. Returns None if it, or another copy of it, is held now, else the reason why not."""
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
        if record is not None and held is None:
            if (subkey is None) != (None in record.items):
                return "the key holds a dictionary" if subkey is None else "the key holds a plain value"
            if len(record.items) >= limits.max_subkeys:
                return f"the dictionary is full ({limits.max_subkeys} subkeys)"
        growth = item.size(subkey) - (held.size(subkey) if held is not None else 0)
        if record is not None and record.size + growth > limits.max_record:
            return f"the record is full ({limits.max_record} bytes)"
        if (record is None and len(self._records) >= limits.max_keys) or self.size + growth > limits.max_bytes:
            if now >= self._scanned_at + SCAN_PERIOD:  # else each refused item would cost a scan of everything
                self._scanned_at = now
                self.expire(now)
            if record is None and len(self._records) >= limits.max_keys:
                return f"the node is full ({limits.max_keys} keys)"
            if self.size + growth > limits.max_bytes:
                return f"the node is full ({limits.max_bytes} bytes)"
        if record is None:
            record = self._records[key] = _Record()
        record.items[subkey] = item
        record.next_expiry = min(record.next_expiry, item.expires_at)
        record.size += growth
        self.size += growth
        return None

    def expire(self, now: float) -> None:
        """Drop all items that have expired."""
        for key, record in list(self._records.items()):
            self._expire_record(key, record, now)

    def _expire_record(self, key: str, record: _Record, now: float) -> None:
        if now < record.next_expiry:
            return
        for subkey in [subkey for subkey, item in record.items.items() if item.expires_at <= now]:
            size = record.items.pop(subkey).size(subkey)
            record.size -= size
            self.size -= size
        record.next_expiry = min((item.expires_at for item in record.items.values()), default=float("inf"))
        if not record.items:
            del self._records[key]
