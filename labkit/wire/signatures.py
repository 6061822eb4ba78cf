"""Signatures by the key pair that a node *is*: whoever knows its public key, the one in contacts, can check them.

That key is a CURVE25519 one, for Diffie-Hellman. XEdDSA (Perrin, "The XEdDSA and VXEdDSA Signature Schemes", 2016)
signs with it what Ed25519 verifies, since both are keys of the same curve, in two forms. Verifying is left to
`cryptography`. That signs with no such key, so that this is done here, in plain integers: it takes a millisecond, and
its time depends on them. A node signs few texts, none of which another one chooses.

Like Ed25519, and unlike Perrin, no random number goes into a signature: the same text has the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

P = (1 << 255) - 19  # the numbers of the curve's field
ORDER = (1 << 252) + 27742317777372353535851937790883648493  # of its base point
D = -121665 * pow(121666, -1, P) % P
BASE = (15112221349535400772501151409588531511454012693041857206046113283949847762202, 4 * pow(5, -1, P) % P)
SIGNATURE_BYTES = 64
_WINDOW = 4  # bits of a number that are looked at together
_NONCE = b"\xfe" + b"\xff" * 31  # so that no nonce is the hash of something else

Point = tuple[int, int, int, int]  # x/z, y/z, z, xy/z
ORIGIN: Point = (0, 1, 1, 0)


class SigningKey:
    """Signs with a node's secret key.

    Args:
        secret: The CURVE secret key, 32 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        clamped = int.from_bytes(secret, "little") & ((1 << 254) - 8) | (1 << 254)
        x, y = _affine(_times_base(clamped))
        # Of the two points with this y, the public key stands for that with the even x.
        self._number = (-clamped if x & 1 else clamped) % ORDER
        self._public = y.to_bytes(32, "little")

    def sign(self, text: bytes) -> bytes:
        """Returns the signature of a text, 64 bytes."""
        nonce = _hash(_NONCE, self._number.to_bytes(32, "little"), text)
        x, y = _affine(_times_base(nonce))
        commitment = (y | (x & 1) << 255).to_bytes(32, "little")
        answer = (nonce + _hash(commitment, self._public, text) * self._number) % ORDER
        return commitment + answer.to_bytes(32, "little")


@lru_cache(maxsize=1 << 14)  # the same records are read again and again
def verify(key: bytes, text: bytes, signature: bytes) -> bool:
    """Whether a text was signed by the node with this public key, 32 bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(_edwards(key)).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=1 << 12)
def _edwards(key: bytes) -> bytes:
    """Returns the Ed25519 form of a public key. Raises `ValueError` if it has none."""
    u = int.from_bytes(key, "little") & ((1 << 255) - 1)
    return ((u - 1) * pow(u + 1, -1, P) % P).to_bytes(32, "little")


def _hash(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little") % ORDER


def _add(one: Point, other: Point) -> Point:
    """Add two points (Hisil et al. 2008), also equal ones."""
    x1, y1, z1, t1 = one
    x2, y2, z2, t2 = other
    a, b = (y1 - x1) * (y2 - x2) % P, (y1 + x1) * (y2 + x2) % P
    c, d = 2 * D * t1 * t2 % P, 2 * z1 * z2 % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


@lru_cache(maxsize=1)
def _table() -> Sequence[Sequence[Point]]:
    """The multiples 0 to 15 of the base point, of 16 times that, and so on."""
    x, y = BASE
    step, rows = (x, y, 1, x * y % P), list[list[Point]]()
    for _ in range(0, 256, _WINDOW):
        row = [ORIGIN]
        for _ in range(1 << _WINDOW):
            row.append(_add(row[-1], step))
        step = row.pop()
        rows.append(row)
    return rows


def _times_base(number: int) -> Point:
    point = ORIGIN
    for row in _table():
        point = _add(point, row[number & ((1 << _WINDOW) - 1)])
        number >>= _WINDOW
    return point


def _affine(point: Point) -> tuple[int, int]:
    inverse = pow(point[2], -1, P)
    return point[0] * inverse % P, point[1] * inverse % P
