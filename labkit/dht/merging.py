"""What several nodes say of one record, as one record. Plain values, no I/O.

A look-up of a large dictionary comes by here with each entry as often as there are replicas that answered, so nothing
is made of an entry that is known already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from labkit.dht.protocol import WireItem
from labkit.dht.signing import verify
from labkit.dht.storage import Item, supersedes


class Version(NamedTuple):
    """One value of a record, of one store."""

    sequence: int
    expires_at: float  # on the local clock
    value: bytes
    owner: bytes | None
    signature: bytes | None


def merge(
    key: str, held: Mapping[str | None, Item], answers: Iterable[tuple[float, Iterable[WireItem]]], now: float
) -> dict[str | None, Version]:
    """What is `held` here and what others answered, by subkey, without what has expired or is not signed as it says.

    `answers`: each with the time from which its items' times to live count.
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
            if new.owner is not None or new.signature is not None:
                known = old is not None and (new.sequence, *new[2:]) == (old.sequence, *old[2:])
                if not known and not verify(key, wire.subkey, _item(new)):
                    continue
            merged[wire.subkey] = new
    return merged


def _item(version: Version) -> Item:
    return Item(version.value, version.expires_at, version.sequence, version.owner, version.signature)
