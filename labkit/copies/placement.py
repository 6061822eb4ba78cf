"""Placement: which servers are to keep copies of an expert. Plain functions: everybody computes the same ranking.

Rendezvous hashing (Thaler & Ravishankar 1998): each server has a score for each expert, and the highest are the
expert's backups. A server that comes or goes moves only those copies that it is to keep, or kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from functools import lru_cache

from labkit.contact import Contact
from labkit.copies.servers import KEY_PREFIX, ServerRecord


def rank(
    uid: str, servers: Iterable[ServerRecord], primary: Contact, holders: Collection[bytes] = ()
) -> list[ServerRecord]:
    """Returns the servers in the order in which they are to keep copies of an expert, without its primary.

    First those with room, on other hosts than the primary: a machine that fails takes all of its servers along. Then
    those with room beside it, and in the end those without room. Servers on loopback count as one host.

    Args:
        uid: The expert.
        servers: All servers of its grid.
        primary: The server that serves it.
        holders: The keys of servers that hold a copy already, or the first `KEY_PREFIX` bytes of them: these have room,
            whatever they say, since they need no more for it.
    """
    held, host = {key[:KEY_PREFIX] for key in holders}, _host(primary)

    def place(record: ServerRecord) -> tuple[bool, bool, bytes]:
        contact = record.contact
        full = record.room == 0 and contact.key[:KEY_PREFIX] not in held
        return full, _host(contact) == host, score(uid, contact.key)

    return sorted((record for record in servers if record.contact.key != primary.key), key=place)


def _host(contact: Contact) -> str:
    return "" if contact.is_loopback else contact.host


@lru_cache(maxsize=1 << 17)
def score(uid: str, key: bytes) -> bytes:
    """Returns a server's place among those that are to keep an expert, by its key: lower comes first."""
    return hashlib.blake2b(uid.encode(), key=key, digest_size=16).digest()
