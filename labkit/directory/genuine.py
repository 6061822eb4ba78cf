"""Whether a record of experts is by who it names. The DHT asks it of all that is stored and read: see `DHTNode`.

Whoever takes an expert over claims it with the next epoch, and signs that with the key that its node is: nobody can
claim an expert for another node, at an address that is not that node's, or take out what it has declared with a higher
epoch. In their first epoch experts are only declared, as ever, and nothing of that outranks a claim. That a node may
claim what it likes in its own name cannot be helped; who connects at all is decided by the swarm (`Admission`).
"""

from __future__ import annotations

from functools import lru_cache

from labkit.directory.index import NAMESPACE, Leaf, Withdrawn, claim_text, decode, withdrawal_text
from labkit.wire.signatures import verify

_decode = lru_cache(maxsize=1 << 12)(decode)  # all leaves of a declaration in the first epoch are equal


def is_genuine(key: str, subkey: str | None, value: bytes, sequence: int) -> bool:
    """Whether an entry of the DHT may be stored, and believed, as far as that depends on what it says of experts.

    Args:
        key: Its key.
        subkey: Its subkey.
        value: What it holds.
        sequence: Its sequence number, by which it supersedes others.
    """
    if subkey is None or not key.startswith(NAMESPACE):
        return True  # it is not about experts
    uid, entry = f"{key.removeprefix(NAMESPACE)}.{subkey}", _decode(value)
    if not isinstance(entry, Leaf | Withdrawn):
        return sequence == 0  # it claims nothing
    if entry.epoch != sequence or not sequence:
        return entry.epoch == sequence
    if isinstance(entry, Leaf):
        return verify(entry.contact.key, claim_text(uid, entry.epoch, entry.contact), entry.signature)
    return verify(entry.key, withdrawal_text(uid, entry.epoch, entry.key), entry.signature)
