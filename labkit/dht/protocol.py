"""What DHT nodes say to each other: the bodies of `dht.ping`, `dht.find` and `dht.store`, and what is believed of them.

Bodies are msgspec structs, checked for types and sizes by the wire before a handler or a caller sees them; the rest is
checked here. Every request names its sender (unless that is a client that serves nobody), so that receivers learn of
it; every reply carries the answering node's key, so that another process on a dead node's port is not taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from labkit.contact import ID_BITS, Contact, shared
from labkit.dht.storage import Item, Limits, Role
from labkit.errors import BadReply

MAX_QUERIES = 256  # keys and ids per find call
MAX_ENTRIES = 1024  # items per store call
MAX_STORE_BYTES = 1024 * 1024  # bytes of items per store call (one item always goes)
MAX_CONTACT_BYTES = 2048  # as it is encoded; what was read before is remembered

ID_BYTES = ID_BITS // 8
_encoder = msgspec.msgpack.Encoder()
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Key = Annotated[str, Meta(max_length=1024)]
_Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


class WireItem(msgspec.Struct, array_like=True, frozen=True):
    """One value of a record. `ttl`: seconds that it has left to live."""

    value: bytes
    ttl: float
    subkey: str | None = None
    sequence: _Count = 0
    cached: bool = False
    owner: bytes | None = None
    signature: bytes | None = None


class Ping(msgspec.Struct, array_like=True, frozen=True):
    """Are you there? `sender`: None for a client that serves nobody, and for one that only wants to know."""

    sender: Contact | None


class Find(msgspec.Struct, array_like=True, frozen=True):
    """For a key values and near contacts are wanted, for an id (20 bytes) contacts only."""

    sender: Contact | None
    keys: Annotated[list[_Key], Meta(max_length=MAX_QUERIES)]
    ids: Annotated[list[_Id], Meta(max_length=MAX_QUERIES)]

    @classmethod
    def of(cls, sender: Contact | None, queries: Sequence[str | bytes]) -> Find:
        """Keys are strings, ids are bytes."""
        return cls(sender, [q for q in queries if isinstance(q, str)], [q for q in queries if isinstance(q, bytes)])

    def queries(self) -> list[str | bytes]:
        """All that is asked, in the order of the answers."""
        return [*self.keys, *self.ids]


class KeyItems(msgspec.Struct, array_like=True, frozen=True):
    """What is to be stored under one key."""

    key: _Key
    items: Annotated[list[WireItem], Meta(max_length=MAX_ENTRIES)]


class Store(msgspec.Struct, array_like=True, frozen=True):
    """Hold these records, each for the time that its items say."""

    sender: Contact | None
    records: Annotated[list[KeyItems], Meta(max_length=MAX_ENTRIES)]


class Answered(msgspec.Struct, array_like=True, frozen=True):
    """What every reply begins with: the public key of the node that answers."""

    key: bytes


class Pong(Answered, frozen=True):
    """I am here."""


class Found(msgspec.Struct, array_like=True, frozen=True):
    """The answer to one query. `left_out`: there are items that had no room in this reply; ask for this key again."""

    nearest: list[_Count]  # indices into the reply's contacts
    items: list[WireItem]
    left_out: bool = False


class FindReply(Answered, frozen=True):
    """One answer per query, in their order. Contacts are listed once, however many queries they are near to; they are
    left encoded until `read_reply`, since most of them have been read before."""

    contacts: list[msgspec.Raw]
    found: list[Found]


class StoreReply(Answered, frozen=True):
    """One text per item, in their order: why it was refused, or empty if it is held now."""

    refusals: list[str]


class NodeAnswer(NamedTuple):
    """What one node said about one target: the contacts nearest to it that it knows, and what it holds.

    `at`: when the node was asked, from which on items' times to live count.
    """

    contacts: Sequence[Contact]
    items: Sequence[WireItem]
    at: float


def to_wire(subkey: str | None, item: Item, now: float) -> WireItem:
    """An item as it leaves this node."""
    cached = item.role is Role.CACHED
    return WireItem(item.value, item.expires_at - now, subkey, item.sequence, cached, item.owner, item.signature)


def from_wire(wire: WireItem, at: float, republish_at: float = float("inf")) -> Item:
    """An item as it arrives; its time to live counts from `at`."""
    role = Role.CACHED if wire.cached else Role.REPLICA
    return Item(wire.value, at + wire.ttl, wire.sequence, wire.owner, wire.signature, role, republish_at)


class ReplyBuilder:
    """Puts a find reply together within `room` bytes of items. The first record always fits."""

    def __init__(self, key: bytes, room: int) -> None:
        self._key = key
        self._room = room
        self._contacts: dict[int, tuple[int, Contact]] = {}
        self._found: list[Found] = []

    def add(self, nearest: Iterable[Contact], items: Mapping[str | None, Item], now: float) -> None:
        """The answer to the next query."""
        indices = []
        for contact in nearest:
            index, _ = self._contacts.setdefault(contact.node_id, (len(self._contacts), contact))
            indices.append(index)
        size = sum(item.size(subkey) for subkey, item in items.items())
        fits = size <= self._room
        if fits:
            self._room -= size
        wire = [to_wire(subkey, item, now) for subkey, item in items.items()] if fits else []
        self._found.append(Found(indices, wire, not fits))

    def build(self) -> FindReply:
        contacts = [_write_contact(contact) for _, contact in self._contacts.values()]
        return FindReply(self._key, contacts, self._found)


@lru_cache(maxsize=1 << 14)  # the same nodes are named again and again
def _write_contact(contact: Contact) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(contact))


@lru_cache(maxsize=1 << 14)
def _read_contact(encoded: bytes) -> Contact:
    if len(encoded) > MAX_CONTACT_BYTES:
        raise ValueError(f"a contact of {len(encoded):,} bytes")
    contact = msgspec.msgpack.decode(encoded, type=Contact)
    if not contact.is_safe:
        raise ValueError(f"{contact.endpoint} would be called without encryption")
    return shared(contact)


def read_reply(
    reply: FindReply, queries: Sequence[str | bytes], at: float, k: int, limits: Limits
) -> list[tuple[NodeAnswer, bool]]:
    """The answers of a find reply, each with whether it was left out. Raises `BadReply` if it makes no sense."""
    if len(reply.found) != len(queries) or len(reply.contacts) > k * len(queries):
        raise BadReply(f"{len(reply.found)} answers and {len(reply.contacts)} contacts to {len(queries)} queries")
    try:
        contacts = [_read_contact(bytes(raw)) for raw in reply.contacts]
    except (ValueError, RecursionError) as error:
        raise BadReply(f"the answer names a contact that is none: {error}") from None
    answers = []
    for query, found in zip(queries, reply.found, strict=True):
        if len(found.nearest) > k or any(index >= len(reply.contacts) for index in found.nearest):
            raise BadReply("the answer names contacts that it does not list, or too many")
        if len(found.items) > limits.max_subkeys or (found.items and isinstance(query, bytes)):
            raise BadReply("the answer has items that were not asked for, or too many")
        for wire in found.items:
            problem = limits.problem_of_item(wire.subkey, wire.value, wire.ttl)
            if problem is not None:
                raise BadReply(f"the answer has an item that cannot be stored: {problem}")
        answers.append((NodeAnswer([contacts[index] for index in found.nearest], found.items, at), found.left_out))
    return answers


def batches(records: Iterable[tuple[str, WireItem]]) -> Iterator[list[KeyItems]]:
    """Items, key by key, in portions that fit into one store call."""
    portion: list[KeyItems] = []
    count = size = 0
    for key, item in records:
        item_size = len(item.value) + len(item.subkey or "") + len(key) + 200
        if portion and (count >= MAX_ENTRIES or size + item_size > MAX_STORE_BYTES):
            yield portion
            portion, count, size = [], 0, 0
        if not portion or portion[-1].key != key:
            portion.append(KeyItems(key, []))
        portion[-1].items.append(item)
        count += 1
        size += item_size
    if portion:
        yield portion
