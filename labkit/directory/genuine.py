"""Whether a record is by who it names. The DHT asks it of all that is stored and read: see `DHTNode`.

Whoever takes an expert over claims it with the next epoch, and signs that with the key that its node is: nobody can
claim an expert for another node, at an address that is not that node's, or take out what it has declared with a higher
epoch. In their first epoch experts are only declared, as ever, and nothing of that outranks a claim. That a node may
claim what it likes in its own name cannot be helped; who connects at all is decided by the swarm (`Admission`).

Servers that keep copies write themselves under the name of their grid, `servers:ffn`, each at its key in hex. Such a
record ends with its signature: nobody can say of another server that it is about to leave, or is elsewhere.
"""

from __future__ import annotations

import re
from functools import lru_cache

import msgspec

from labkit.directory.index import NAMESPACE, Leaf, Sign, Withdrawn, claim_text, decode, withdrawal_text
from labkit.wire.signatures import SIGNATURE_BYTES, verify

OWN_NAMESPACE = "servers:"  # below which each node writes of itself
_MARK = b"\xc4" + bytes([SIGNATURE_BYTES])  # how MessagePack begins so many bytes
_KEY = re.compile("[0-9a-f]{64}")


def own_text(key: str, subkey: str | None, value: bytes, sequence: int) -> bytes:
    """Returns what a node signs that writes of itself."""
    return msgspec.msgpack.encode(("labkit own record 1", key, subkey, value, sequence))


def signed(key: str, subkey: str, value: bytes, sequence: int, sign: Sign | None) -> bytes:
    """Returns a record of this node with its signature behind it; without `sign`, as it is."""
    return value if sign is None else value + _MARK + sign(own_text(key, subkey, value, sequence))


def unsigned(value: bytes) -> bytes:
    """Returns a record without the signature behind it, if there is one."""
    start = len(value) - SIGNATURE_BYTES - len(_MARK)
    return value[:start] if start > 0 and value[start:].startswith(_MARK) else value


_decode = lru_cache(maxsize=1 << 12)(decode)  # all leaves of a declaration in the first epoch are equal


def is_genuine(key: str, subkey: str | None, value: bytes, sequence: int) -> bool:
    """Whether an entry of the DHT may be stored, and believed, as far as that depends on who it is by.

    Args:
        key: Its key.
        subkey: Its subkey.
        value: What it holds.
        sequence: Its sequence number, by which it supersedes others.
    """
    if key.startswith(OWN_NAMESPACE):
        text, signature = own_text(key, subkey, unsigned(value), sequence), value[-SIGNATURE_BYTES:]
        return (
            subkey is not None
            and _KEY.fullmatch(subkey) is not None
            and (verify(bytes.fromhex(subkey), text, signature))
        )
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
