"""What DHT nodes send each other: the bodies of `dht.ping`, `dht.find` and `dht.store`, and the checks on them.

Bodies are msgspec structs. The wire checks their types and sizes before a handler or a caller sees them; the rest is
checked here. Every request names its sender (unless that is a client that answers no calls), so that receivers learn of
it. Every reply carries the answering node's key, so that another process on a dead node's port is not taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from labkit.contact import ID_BITS, Contact, intern_contact
from labkit.dht.storage import ITEM_OVERHEAD, Item, Limits, Role
from labkit.errors import BadReply

MAX_QUERIES = 256  # keys and ids in a find call
MAX_ENTRIES = 1024  # items in a store call
MAX_STORE_BYTES = 1024 * 1024  # bytes of the items in a store call, unless it is one item
MAX_CONTACT_BYTES = 2048  # bytes of an encoded contact; those that were read are remembered

ID_BYTES = ID_BITS // 8
_encoder = msgspec.msgpack.Encoder()
_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Key = Annotated[str, Meta(max_length=1024)]
_Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]


class WireItem(msgspec.Struct, array_like=True, frozen=True):
    """One value of a record. `ttl` is the time that it has left to live, in seconds."""

    value: bytes
    ttl: float
    subkey: str | None = None
    sequence: _Count = 0
    cached: bool = False
    owner: bytes | None = None
    signature: bytes | None = None


class Ping(msgspec.Struct, array_like=True, frozen=True):
    """Asks whether a node is there. `sender` is None if the caller does not want to be known as a node."""

    sender: Contact | None


class Find(msgspec.Struct, array_like=True, frozen=True):
    """Asks for the values of keys and the contacts near to them, and for the contacts near to ids (20 bytes)."""

    sender: Contact | None
    keys: Annotated[list[_Key], Meta(max_length=MAX_QUERIES)]
    ids: Annotated[list[_Id], Meta(max_length=MAX_QUERIES)]

    @classmethod
    def of(cls, sender: Contact | None, queries: Sequence[str | bytes]) -> Find:
        """Make the body for these queries: keys are strings, ids are bytes."""
        return cls(sender, [q for q in queries if isinstance(q, str)], [q for q in queries if isinstance(q, bytes)])

    def queries(self) -> list[str | bytes]:
        """Returns all queries, in the order of their answers."""
        return [*self.keys, *self.ids]


class KeyItems(msgspec.Struct, array_like=True, frozen=True):
    """Items to be stored under one key."""

    key: _Key
    items: Annotated[list[WireItem], Meta(max_length=MAX_ENTRIES)]


class Store(msgspec.Struct, array_like=True, frozen=True):
    """Asks a node to hold records, each item for its time to live."""

    sender: Contact | None
    records: Annotated[list[KeyItems], Meta(max_length=MAX_ENTRIES)]


class Answered(msgspec.Struct, array_like=True, frozen=True):
    """The beginning of every reply: the public key of the node that answers."""

    key: bytes


class Pong(Answered, frozen=True):
    """The answer to `Ping`."""


class Found(msgspec.Struct, array_like=True, frozen=True):
    """The answer to one query. `left_out`: its items had no room in this reply; ask for this key again."""

    nearest: list[_Count]  # indices into the reply's contacts
    items: list[WireItem]
    left_out: bool = False


class FindReply(Answered, frozen=True):
    """One answer per query, in their order.

    A contact is listed once, however many queries it is near to. Contacts stay encoded until `read_reply`, since most
    of them have been read before.
    """

    contacts: list[msgspec.Raw]
    found: list[Found]


class StoreReply(Answered, frozen=True):
    """One text per item, in their order: empty if the node holds it now, else the reason why not."""

    refusals: list[str]


class NodeAnswer(NamedTuple):
    """One node's answer about one target: the nearest contacts that it knows, and the items that it holds.

    `at` is the time at which the node was asked; the items' times to live count from then.
    """

    contacts: Sequence[Contact]
    items: Sequence[WireItem]
    at: float


def to_wire(subkey: str | None, item: Item, now: float) -> WireItem:
    """Returns an item as it leaves this node."""
    cached = item.role is Role.CACHED
    return WireItem(item.value, item.expires_at - now, subkey, item.sequence, cached, item.owner, item.signature)


def from_wire(wire: WireItem, at: float, republish_at: float = float("inf")) -> Item:
    """Returns an item as it arrives. Its time to live counts from `at`."""
    role = Role.CACHED if wire.cached else Role.REPLICA
    return Item(wire.value, at + wire.ttl, wire.sequence, wire.owner, wire.signature, role, republish_at)


class ReplyBuilder:
    """Builds a find reply with at most `room` bytes of items. A record that does not fit is marked as left out."""

    def __init__(self, key: bytes, room: int) -> None:
        self._key = key
        self._room = room
        self._contacts: dict[int, tuple[int, Contact]] = {}
        self._found: list[Found] = []

    def add(self, nearest: Iterable[Contact], items: Mapping[str | None, Item], size: int, now: float) -> None:
        """Add the answer to the next query. `size`: that of all items, see `Item.size`."""
        indices = []
        for contact in nearest:
            index, _ = self._contacts.setdefault(contact.node_id, (len(self._contacts), contact))
            indices.append(index)
        fits = size <= self._room
        if fits:
            self._room -= size
        wire = [to_wire(subkey, item, now) for subkey, item in items.items()] if fits else []
        self._found.append(Found(indices, wire, not fits))

    def build(self) -> FindReply:
        """Returns the reply."""
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
    return intern_contact(contact)


def read_reply(
    reply: FindReply, queries: Sequence[str | bytes], at: float, k: int, limits: Limits
) -> list[tuple[NodeAnswer, bool]]:
    """Read and check a find reply.

    Args:
        reply: The reply.
        queries: What was asked.
        at: When it was asked.
        k: How many contacts an answer may name.
        limits: Limits of items.

    Returns:
        The answer to each query, and whether its items were left out.

    Raises:
        BadReply: The reply makes no sense.
    """
    if len(reply.found) != len(queries) or len(reply.contacts) > k * len(queries):
        raise BadReply(f"{len(reply.found)} answers and {len(reply.contacts)} contacts to {len(queries)} queries")
    try:
        contacts = [_read_contact(bytes(raw)) for raw in reply.contacts]
    except (ValueError, RecursionError) as error:
        raise BadReply(f"the answer names a contact that is none: {error}") from None
    answers = []
    for query, found in zip(queries, reply.found, strict=True):
        if len(found.nearest) > k or max(found.nearest, default=-1) >= len(contacts):
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
    """Split items, given key by key, into portions that fit into one store call each."""
    portion: list[KeyItems] = []
    count = size = 0
    for key, item in records:
        item_size = len(item.value) + len(item.subkey or "") + len(key) + ITEM_OVERHEAD
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
