"""The prefix index: how experts are written in the DHT, and how its records are read. Plain state, no I/O.

For the expert `ffn.3.17` there are two entries (paper, section 3.2):

    key "expert:ffn.3", subkey "17": a leaf, the server's contact and the stamp of its declaration
    key "expert:ffn",   subkey "3.": a marker, "something is alive below" (the dot keeps it apart from an expert ffn.3)

So a prefix's record says which next coordinates are alive, and an expert's address is written in one place only, the
leaf in its parent's record. Anybody can write to the DHT: what does not parse is ignored and counted. A marker lives as
long as the newest declaration below it, so it can outlive the last expert.

A leaf says the epoch of its expert, too, which grows with each change of the server that serves it. It is the
sequence number of the entry, so that the DHT itself prefers the higher epoch, whatever comes later. From the second
epoch on it is signed by the server that it names (`genuine`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from labkit.contact import Contact
from labkit.dht.node import Entry, Value
from labkit.directory.suspicion import Suspicions, boot_of
from labkit.expert_uid import MAX_COORDINATE, ExpertInfo, parent, split_uid
from labkit.wire.signatures import SIGNATURE_BYTES

NAMESPACE = "expert:"
MAX_COPIES = 8  # of an expert that its leaf names
KEY_BYTES = 8  # of the public key of a server, by which a leaf names it
_SUBKEY = re.compile(r"(0|[1-9][0-9]{0,6})(\.?)")


Epoch = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Signature = Annotated[bytes, msgspec.Meta(max_length=SIGNATURE_BYTES)]
Sign = Callable[[bytes], bytes]  # signs a text with the key that a node is


@dataclass(frozen=True, slots=True)
class Declared:
    """What a server declares of an expert besides itself. See `ExpertInfo`."""

    epoch: int = 0
    copies: tuple[bytes, ...] = ()


Declarations = Mapping[str, Declared]  # by uid
PLAIN = Declared()


def as_declarations(uids: Collection[str] | Declarations) -> Declarations:
    """Returns declarations of these experts; without copies, and in their first epoch, if only uids are given."""
    return uids if isinstance(uids, Mapping) else dict.fromkeys(uids, PLAIN)


class Leaf(msgspec.Struct, frozen=True, array_like=True, tag="e1"):
    """An expert. The tag is a version, too: unknown tags are ignored, and new fields may be added at the end."""

    contact: Contact
    stamp: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    since: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] = 0  # see `ExpertInfo`, also for those that follow
    epoch: Epoch = 0
    copies: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)], ...],
        msgspec.Meta(max_length=MAX_COPIES),
    ] = ()
    signature: Signature = b""  # of `claim_text` by the server, from the second epoch on


class Marker(msgspec.Struct, frozen=True, array_like=True, tag="p1"):
    """A mark that some expert is alive below this prefix."""


class Withdrawn(msgspec.Struct, frozen=True, array_like=True, tag="w1"):
    """What takes the place of a leaf whose server, with that `key`, has left. `epoch`: of that leaf."""

    epoch: Epoch = 0
    key: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    signature: Signature = b""  # of `withdrawal_text` by that server, from the second epoch on


def claim_text(uid: str, epoch: int, contact: Contact) -> bytes:
    """Returns what a server signs that serves an expert in an epoch, at its own contact."""
    return msgspec.msgpack.encode(("labkit expert 1", uid, epoch, contact))


def withdrawal_text(uid: str, epoch: int, key: bytes) -> bytes:
    """Returns what a server with this key signs that takes out what it has declared of an expert."""
    return msgspec.msgpack.encode(("labkit withdrawal 1", uid, epoch, key))


_DECODER: msgspec.msgpack.Decoder[Leaf | Marker | Withdrawn] = msgspec.msgpack.Decoder(Leaf | Marker | Withdrawn)
_MARKER = msgspec.msgpack.encode(Marker())


def entries_of(
    uids: Collection[str] | Declarations,
    contact: Contact,
    stamp: int,
    ttl: float,
    since: int = 0,
    sign: Sign | None = None,
) -> list[Entry]:
    """Returns a declaration as DHT entries: a leaf for each expert, and a marker for each prefix above it.

    Args:
        uids: The experts, perhaps with their epochs and copies.
        contact: The node that holds them.
        stamp: Of this declaration (`suspicion.make_stamp`).
        ttl: How long the declaration lives, seconds.
        since: When the server began to declare experts (see `ExpertInfo`).
        sign: Signs with the key of that node; without it, claims of later epochs are not believed.

    Raises:
        ValueError: One of `uids` is no uid.
    """
    leaves, entries = dict[Declared, bytes](), dict[str, Entry]()
    for uid, said in as_declarations(uids).items():
        _, coordinates = split_uid(uid)
        prefix, coordinate = parent(uid)
        if said.epoch and sign is not None:
            signature = sign(claim_text(uid, said.epoch, contact))
            leaf = _leaf(contact, stamp, since, said, signature)
        else:
            leaf = leaves[said] = leaves.get(said) or _leaf(contact, stamp, since, said)
        entries[uid] = Entry(NAMESPACE + prefix, leaf, ttl, str(coordinate), sequence=said.epoch)
        for _ in coordinates[1:]:
            below = f"{prefix}."
            if below in entries:
                break  # then all markers above it are there too
            prefix, coordinate = parent(prefix)
            entries[below] = Entry(NAMESPACE + prefix, _MARKER, ttl, f"{coordinate}.")
    return list(entries.values())


def _leaf(contact: Contact, stamp: int, since: int, said: Declared, signature: bytes = b"") -> bytes:
    return msgspec.msgpack.encode(Leaf(contact, stamp, since, said.epoch, said.copies[:MAX_COPIES], signature))


def withdrawals_of(
    uids: Collection[str] | Mapping[str, int], ttl: float, key: bytes = b"", sign: Sign | None = None
) -> list[Entry]:
    """Returns the entries that replace the leaves of experts whose server leaves.

    They live as long as a declaration, `ttl` seconds, so that they outlive the leaves, wherever copies of these are
    left. Of two entries of one epoch that which expires later counts: a declaration that comes after them replaces them
    in turn.

    Args:
        uids: The experts, perhaps with their epochs.
        ttl: Seconds.
        key: The public key of the server.
        sign: Signs with it.
    """

    def entry(uid: str, epoch: int) -> bytes:
        if epoch == 0 or sign is None:
            return msgspec.msgpack.encode(Withdrawn(epoch))
        return msgspec.msgpack.encode(Withdrawn(epoch, key, sign(withdrawal_text(uid, epoch, key))))

    epochs = uids if isinstance(uids, Mapping) else dict.fromkeys(uids, 0)
    places = [(*parent(uid), uid, epoch) for uid, epoch in epochs.items()]
    return [
        Entry(NAMESPACE + prefix, entry(uid, epoch), ttl, str(coordinate), sequence=epoch)
        for prefix, coordinate, uid, epoch in places
    ]


def uid_of(entry: Entry) -> str | None:
    """Returns the expert of a leaf, or of what takes its place; None for a marker."""
    if entry.subkey is None or entry.subkey.endswith("."):
        return None
    return f"{entry.key.removeprefix(NAMESPACE)}.{entry.subkey}"


Decoded = dict[
    bytes, "Leaf | Marker | Withdrawn | None"
]  # the values of one read: all leaves of one declaration are equal


def decode(data: bytes) -> Leaf | Marker | Withdrawn | None:
    """Decode a value that anybody may have written. Returns None if it is none of those."""
    try:
        entry = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    # As with invitations: tensors do not cross a network in the clear because a record says so.
    if isinstance(entry, Leaf) and not entry.contact.is_safe:
        return None
    return entry


class Children:
    """The live next coordinates of one prefix, at one moment. It is shared: do not change it.

    Args:
        inner: Coordinates below which some expert is alive.
        experts: The experts right below the prefix, by their last coordinate. A prefix has both if grids of different
            dimensions share a name.
    """

    __slots__ = ("_masks", "experts", "inner")

    def __init__(self, inner: Iterable[int] = (), experts: Mapping[int, ExpertInfo] | None = None) -> None:
        self.inner = frozenset(inner)
        self.experts: Mapping[int, ExpertInfo] = experts or {}
        self._masks: dict[tuple[int, bool], npt.NDArray[np.bool_]] = {}

    def __bool__(self) -> bool:
        return bool(self.inner or self.experts)

    def __repr__(self) -> str:
        return f"Children(inner={sorted(self.inner)}, experts={dict(self.experts)})"

    def mask(self, size: int, last: bool) -> npt.NDArray[np.bool_]:
        """Returns [size], True where a coordinate is alive: one of `experts` if `last`, else one of `inner`."""
        if (size, last) not in self._masks:
            mask = np.zeros(size, dtype=np.bool_)
            mask[[coordinate for coordinate in (self.experts if last else self.inner) if coordinate < size]] = True
            mask.flags.writeable = False
            self._masks = {(size, last): mask}  # only one: as a rule, a prefix is searched in one grid
        return self._masks[size, last]


NO_CHILDREN = Children()


class PrefixRecord:
    """The cached record of one prefix: what was read, and the view of it that is still true.

    Args:
        prefix: The prefix.
        read_at: When it was read, on trio's clock.
    """

    def __init__(self, prefix: str, read_at: float) -> None:
        self.prefix = prefix
        self.read_at = read_at
        self.leaves: dict[int, tuple[ExpertInfo, float]] = {}  # coordinate -> expert, expiration
        self.markers: dict[int, float] = {}  # coordinate -> expiration
        self.withdrawn: dict[int, tuple[int, float]] = {}  # coordinate -> epoch, expiration: their servers have left
        self.asked_at = -math.inf  # when a refresh was last requested
        self.doubted = False  # whether one of its experts has failed since it was read
        self.orphaned = False  # whether one has lost its server and has copies: others are about to carry it on
        self._view: Children | None = None
        self._view_until = -math.inf

    def take(self, record: Value | Mapping[str, Value] | None, limit: int, decoded: Decoded) -> int:
        """Take at most `limit` children from what the DHT returned. Returns how many entries were malformed."""
        if record is None:
            return 0
        if not isinstance(record, Mapping):
            return 1  # a plain value where a dictionary belongs
        malformed = 0
        for subkey, value in record.items():
            if len(self.leaves) + len(self.markers) + len(self.withdrawn) >= limit:
                break
            if value.data not in decoded:
                decoded[value.data] = decode(value.data)
            entry, match = decoded[value.data], _SUBKEY.fullmatch(subkey)
            coordinate = int(match[1]) if match else MAX_COORDINATE + 1
            if match is None or coordinate > MAX_COORDINATE:
                malformed += 1
            elif isinstance(entry, Marker) and match[2]:
                self.markers[coordinate] = value.expires_at
            elif isinstance(entry, Withdrawn) and not match[2]:
                self.withdrawn[coordinate] = entry.epoch, value.expires_at
            elif isinstance(entry, Leaf) and not match[2]:
                uid = f"{self.prefix}.{coordinate}"
                info = ExpertInfo(uid, entry.contact, entry.stamp, entry.since, entry.epoch, entry.copies)
                self.leaves[coordinate] = (info, value.expires_at)
            else:
                malformed += 1  # undecodable, or a leaf where a marker belongs
        return malformed

    def keep_unexpired(self, old: PrefixRecord, now: float, limit: int) -> None:
        """Keep the entries of an older record that have not expired, at most `limit`.

        No entry of the DHT ends before its expiration: a read without one has only missed the node that holds it. But a
        server that leaves replaces its leaves, and of a leaf and what replaced it, that of the higher epoch counts, and
        of one epoch that which expires later.
        """
        for coordinate, expires_at in old.markers.items():
            if now < expires_at and (coordinate in self.markers or len(self.markers) < limit):
                self.markers[coordinate] = max(expires_at, self.markers.get(coordinate, expires_at))
        for coordinate, gone in old.withdrawn.items():
            if now < gone[1] and (coordinate in self.withdrawn or len(self.withdrawn) < limit):
                self.withdrawn[coordinate] = max(gone, self.withdrawn.get(coordinate, gone))
        for coordinate in [c for c in self.leaves if self._is_withdrawn(c, *self.leaves[c])]:
            del self.leaves[coordinate]  # an old copy
        for coordinate, (info, expires_at) in old.leaves.items():
            if self._is_withdrawn(coordinate, info, expires_at):
                continue
            other = self.leaves.get(coordinate)
            if now < expires_at and (_is_older(other[0], info) if other else len(self.leaves) < limit):
                self.leaves[coordinate] = (info, expires_at)

    def _is_withdrawn(self, coordinate: int, info: ExpertInfo, expires_at: float) -> bool:
        return (info.epoch, expires_at) <= self.withdrawn.get(coordinate, (-1, 0.0))

    def move(self, coordinate: int, before: ExpertInfo, info: ExpertInfo, expires_at: float) -> None:
        """Note that an expert is not where it was `before`. A leaf of a later epoch stays, or of another server."""
        held = self.leaves[coordinate][0] if coordinate in self.leaves else before
        if held.epoch < info.epoch or (held.epoch == info.epoch and held.contact.key == before.contact.key):
            self.leaves[coordinate] = (info, expires_at)
            self.changed()

    def changed(self) -> None:
        """Note that the suspicions about its experts have changed."""
        self._view = None

    def children(self, now: float, suspicions: Suspicions) -> Children:
        """Returns the children at `now`, without those that have expired and without experts that are suspended."""
        if self._view is None or now >= self._view_until:
            until, experts, self.orphaned = math.inf, dict[int, ExpertInfo](), False
            for coordinate, (info, expires_at) in self.leaves.items():
                if now < expires_at:
                    offered_at = suspicions.suspended_until(info, now)
                    until = min(until, expires_at, offered_at if offered_at > now else math.inf)
                    if offered_at <= now:
                        experts[coordinate] = info
                    elif info.copies and suspicions.is_lost(info):
                        self.orphaned = True
            inner = [coordinate for coordinate, expires_at in self.markers.items() if now < expires_at]
            self._view_until = min([until, *(self.markers[coordinate] for coordinate in inner)])
            self._view = Children(inner, experts) if inner or experts else NO_CHILDREN
        return self._view


def _is_older(info: ExpertInfo, than: ExpertInfo) -> bool:
    """Whether `info` is of a lower epoch than `than`, or an earlier declaration by the same server in the same life.

    Between servers, in one epoch, the declaration counts that the DHT returns.
    """
    if info.epoch != than.epoch:
        return info.epoch < than.epoch
    same_life = (info.contact.key, boot_of(info.stamp)) == (than.contact.key, boot_of(than.stamp))
    return same_life and info.stamp < than.stamp
