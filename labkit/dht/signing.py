"""Signed records, and `merge`, which makes one record of the answers of several nodes and checks signatures on the way.

A signature (Ed25519) is over key, subkey, value and sequence. The time to live is not signed, because it is counted
down on the way: any node that holds a signed record can keep it alive, but cannot change it, nor bring it back once the
owner has stored a higher sequence number.

Order: signing, verifying, merging.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from labkit.dht.protocol import WireItem
from labkit.dht.storage import Entry, IsGenuine, Item, anything, supersedes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_DOMAIN = "labkit dht record 1"  # so that no signature made for another purpose is valid for a record


def signed_bytes(key: str, subkey: str | None, value: bytes, sequence: int) -> bytes:
    """Returns the bytes that the owner of a record signs."""
    return msgspec.msgpack.encode((_DOMAIN, key, subkey, value, sequence))


class Signer:
    """The owner of records. To replace a signed entry later, sign one with a higher `sequence`.

    Args:
        seed: 32 secret bytes; random by default.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key: Ed25519PrivateKey = (
            Ed25519PrivateKey.generate() if seed is None else Ed25519PrivateKey.from_private_bytes(seed)
        )
        self.owner: bytes = self._key.public_key().public_bytes_raw()  # 32 bytes, public

    def sign(self, entry: Entry) -> Entry:
        """Returns the entry with its owner and signature."""
        signature = self._key.sign(signed_bytes(entry.key, entry.subkey, entry.value, entry.sequence))
        return replace(entry, owner=self.owner, signature=signature)


def verify(key: str, subkey: str | None, item: Item) -> bool:
    """Whether an item was signed by its owner."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if item.owner is None or item.signature is None:
        return False
    try:
        owner = Ed25519PublicKey.from_public_bytes(item.owner)
        owner.verify(item.signature, signed_bytes(key, subkey, item.value, item.sequence))
    except (InvalidSignature, ValueError):
        return False
    return True


class Version(NamedTuple):
    """One value of a key and subkey, as one of several nodes has it."""

    sequence: int
    expires_at: float  # on the local clock
    value: bytes
    owner: bytes | None
    signature: bytes | None


def merge(
    key: str,
    held: Mapping[str | None, Item],
    answers: Iterable[tuple[float, Iterable[WireItem]]],
    now: float,
    is_genuine: IsGenuine = anything,
) -> dict[str | None, Version]:
    """Merge what is held here with what other nodes answered, without what has expired or has no valid signature.

    Args:
        key: The key of the record.
        held: The items that this node holds, by subkey.
        answers: The items of each answer, with the time from which their times to live count.
        now: The time.
        is_genuine: Whether an entry is by who it names.

    Returns:
        The version that supersedes all others, by subkey.
    """
    merged = {
        subkey: Version(item.sequence, item.expires_at, item.value, item.owner, item.signature)
        for subkey, item in held.items()
    }
    for at, items in answers:
        for wire in items:
            new = Version(wire.sequence, at + wire.ttl, wire.value, wire.owner, wire.signature)
            if new.expires_at <= now:
                continue
            old = merged.get(wire.subkey)
            if old is not None and not supersedes(new, old):
                continue
            known = old is not None and (new.sequence, *new[2:]) == (old.sequence, *old[2:])
            signed = new.owner is not None or new.signature is not None
            if signed and not known and not verify(key, wire.subkey, _item(new)):
                continue
            if not known and not is_genuine(key, wire.subkey, new.value, new.sequence):
                continue
            merged[wire.subkey] = new
    return merged


def _item(version: Version) -> Item:
    return Item(version.value, version.expires_at, version.sequence, version.owner, version.signature)
