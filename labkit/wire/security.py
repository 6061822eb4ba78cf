"""A node's identity, and who may connect to it.

A node *is* its key pair: one 32-byte seed gives a CURVE25519 pair for the wire and an Ed25519 key for signing records.
The seed is kept in a file that only its owner can read. ZeroMQ asks over ZAP (RFC 27) whether a client may connect, and
an `Admission` decides.

Order: identities and keys, admission, lists of keys in files (`Members` keeps the one of a private swarm), ZAP.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import zmq
from zmq.utils import z85

from labkit.contact import is_loopback
from labkit.errors import LabkitError
from labkit.paths import user_path
from labkit.wire.signatures import SigningKey

logger = logging.getLogger(__name__)
_KEY_FILE_HEADER = "labkit-key-1"


@dataclass(frozen=True)
class Identity:
    """A node's keys, all derived from `seed` (32 secret bytes)."""

    seed: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> Identity:
        """Make a new identity that exists in memory only."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Read a key file. Raises `LabkitError` if it cannot be used, or other users can read it."""
        path = user_path(path, "key")
        try:
            if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise LabkitError(f"the key file {path} can be read by others; make it yours alone: chmod 600 {path}")
            header, _, seed = path.read_text().strip().partition(" ")
            if header != _KEY_FILE_HEADER:
                raise ValueError("not a labkit key file")
            return cls(_check_key(bytes.fromhex(seed)))
        except FileNotFoundError:
            raise LabkitError(f"there is no key file {path}; make one: labkit keygen {path}") from None
        except (OSError, ValueError) as error:
            raise LabkitError(f"the key file {path} cannot be used: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a key file with mode 600. Raises `LabkitError` if the file exists."""
        path = user_path(path, "key")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise LabkitError(f"{path} exists already; a key file is never overwritten") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{_KEY_FILE_HEADER} {self.seed.hex()}\n")

    @cached_property
    def secret_key(self) -> bytes:
        """The CURVE secret key, 32 bytes."""
        return self.derive(b"curve")

    @cached_property
    def public_key(self) -> bytes:
        """The CURVE public key, 32 bytes: the one in contacts and invitations."""
        return z85.decode(zmq.curve_public(z85.encode(self.secret_key)))

    def sign(self, text: bytes) -> bytes:
        """Returns our signature of a text, which `signatures.verify` checks with our public key."""
        return self._signing_key.sign(text)

    @cached_property
    def _signing_key(self) -> SigningKey:
        return SigningKey(self.secret_key)

    def derive(self, purpose: bytes) -> bytes:
        """Returns 32 secret bytes for one purpose. Those of different purposes reveal nothing of each other."""
        return hashlib.blake2b(self.seed, digest_size=32, person=purpose).digest()


def key_text(key: bytes) -> str:
    """Returns a public key as people pass it around: 43 letters of URL-safe base64."""
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def parse_key(text: str | bytes) -> bytes:
    """Returns the 32 bytes of a public key given as text (or as bytes). Raises `ValueError` if it is none."""
    if isinstance(text, bytes):
        return _check_key(text)
    try:
        return _check_key(base64.urlsafe_b64decode(text.strip() + "=" * (-len(text.strip()) % 4)))
    except (binascii.Error, ValueError):
        raise ValueError(f"{text!r} is not a public key; `labkit keygen` prints one of 43 letters") from None


def _check_key(key: bytes) -> bytes:
    if len(key) != 32:
        raise ValueError(f"a key has 32 bytes, not {len(key)}")
    return key


class Admission:
    """Decides who may connect: anybody, or the keys of a list.

    Args:
        keys: The public keys to admit.
        file: A file of public keys to admit as well, read again whenever it changes. With neither, all are admitted.
    """

    def __init__(self, keys: Iterable[bytes] | None = None, file: Path | None = None) -> None:
        self._keys = None if keys is None else frozenset(keys)
        self._file = file
        self._file_state: tuple[int, int] | None = None
        self._file_keys: frozenset[bytes] = frozenset()

    @property
    def is_open(self) -> bool:
        """Whether anybody who knows our public key may connect."""
        return self._keys is None and self._file is None

    def admits(self, key: bytes) -> bool:
        """Whether the holder of this public key may connect."""
        return self.is_open or key in (self._keys or ()) or key in self._from_file()

    def _from_file(self) -> frozenset[bytes]:
        if self._file is None:
            return frozenset()
        try:
            status = self._file.stat()
            state = (status.st_mtime_ns, status.st_size)
            if state != self._file_state:
                self._file_keys = read_key_list(self._file)
                self._file_state = state
        except (OSError, ValueError) as error:
            logger.error("the list of admitted keys cannot be read, nobody new is admitted: %s", error)
            return frozenset()
        return self._file_keys


def must_encrypt(secure: bool | None, host: str, admission: Admission) -> bool:
    """Whether a node that listens at `host` encrypts: always beyond loopback and in private swarms, else if `secure`.

    Raises `ValueError` if `secure` is False where it must.
    """
    always = not is_loopback(host) or not admission.is_open
    if secure is False and always:
        raise ValueError("secure=False is for open swarms on loopback only: beyond it every connection is encrypted")
    return bool(secure) or always


def read_key_list(path: Path) -> frozenset[bytes]:
    """Returns the public keys in a file, one a line; `#` begins a comment."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return frozenset(parse_key(line) for line in lines if line)


def write_key_list(path: Path, keys: Iterable[bytes]) -> None:
    """Replace a file of public keys, in one step."""
    new = path.with_name(path.name + ".new")
    new.write_text("".join(f"{key_text(key)}\n" for key in sorted(keys)))
    os.replace(new, path)


class Members:
    """The members of a private swarm: the keys that may connect, and the file in which its servers read them.

    Args:
        keys: The public keys of the first members; None for an open swarm, which anybody may join.
        file: Where to keep them.
    """

    def __init__(self, keys: Iterable[str | bytes] | None, file: Path) -> None:
        self._keys = None if keys is None else {parse_key(key) for key in keys}
        self.file = None if keys is None else file

    def admission(self) -> Admission:
        """Returns the admission for a node of this swarm."""
        return Admission(file=self.file)

    def admit(self, *keys: bytes) -> bool:
        """Let these keys connect from now on. Returns False if the swarm is open, and all may anyway."""
        if self._keys is None or self.file is None:
            return False
        self._keys.update(keys)
        write_key_list(self.file, self._keys)
        return True


def answer_zap(frames: Sequence[bytes], admissions: dict[bytes, Admission]) -> list[bytes] | None:
    """Returns the ZAP reply to a ZAP request (RFC 27), or None if it is no request.

    The user id of an admitted connection is its public key in hex and the address that it comes from, so that every
    message from it carries the key that the handshake proved.

    Args:
        frames: A message of the ZAP socket.
        admissions: Who may connect, by ZAP domain; each node has one.
    """
    try:
        start = list(frames).index(b"") + 1
        version, request_id, domain, address, _identity, mechanism, *credentials = frames[start:]
    except ValueError:
        return None
    envelope = list(frames[:start])
    admission = admissions.get(domain)
    ok = version == b"1.0" and mechanism == b"CURVE" and len(credentials) == 1 and admission is not None
    if ok and admission is not None and admission.admits(credentials[0]):
        return [*envelope, b"1.0", request_id, b"200", b"OK", credentials[0].hex().encode() + address, b""]
    return [*envelope, b"1.0", request_id, b"400", b"not admitted", b"", b""]
