"""Records that have an owner: Ed25519 signatures over (key, subkey, value, sequence).

The time to live is not signed, because it is counted down on the way: whoever holds a signed record can keep it alive,
but cannot change it, nor put it back once the owner has stored a higher sequence number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from labkit.dht.storage import Entry, Item

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_DOMAIN = "labkit dht record 1"  # so that a signature made for something else is never one of a record


def signed_bytes(key: str, subkey: str | None, value: bytes, sequence: int) -> bytes:
    """What the owner of a record signs."""
    return msgspec.msgpack.encode((_DOMAIN, key, subkey, value, sequence))


class Signer:
    """The owner of records. `seed`: 32 secret bytes, made up if not given.

    `sign(entry)` gives the entry with owner and signature; to replace it later, sign one with a higher `sequence`.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key: Ed25519PrivateKey = (
            Ed25519PrivateKey.generate() if seed is None else Ed25519PrivateKey.from_private_bytes(seed)
        )
        self.owner: bytes = self._key.public_key().public_bytes_raw()  # 32 bytes, public

    def sign(self, entry: Entry) -> Entry:
        """The entry, owned."""
        signature = self._key.sign(signed_bytes(entry.key, entry.subkey, entry.value, entry.sequence))
        return replace(entry, owner=self.owner, signature=signature)


def verify(key: str, subkey: str | None, item: Item) -> bool:
    """Whether the item's owner has signed it."""
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
