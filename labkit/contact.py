"""Who a node is and where it is reached: a public key and an address.

A contact is what the DHT's routing tables hold, what an expert's record points to, and, as text, what an invitation
is. A node id is the hash of the public key, so a peer proves its id by the CURVE handshake.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import re
from functools import lru_cache
from typing import Any

import msgspec

from labkit.errors import InviteError

ID_BITS = 160
SCHEME = "labkit://"
LOOPBACK_NOTE = (
    "This invitation is for the same machine only, since the swarm listens on loopback; to be reached from other "
    'machines, start it with listen="tcp://0.0.0.0:*" (labkit serve --listen tcp://0.0.0.0:*) and, behind a router, '
    'announce="HOST:PORT"'
)
_HOST = re.compile(r"[\w.:%-]{1,255}")  # nothing that a terminal would obey


class _NodeId:
    """160-bit Kademlia id: the hash of the public key. Computed when it is first read, like a `cached_property`, but
    without the lock of that, since there are many contacts."""

    def __get__(self, contact: Contact, owner: type[Contact]) -> int:
        value: int = contact.__dict__.setdefault("node_id", node_id_of(contact.key))
        return value


class Contact(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """A node's public key and address. `secure`: whether connections to it are encrypted (CURVE)."""

    key: bytes  # 32 bytes, CURVE25519 public key
    host: str
    port: int
    secure: bool = True

    def __post_init__(self) -> None:
        if len(self.key) != 32:
            raise ValueError(f"a contact's key has 32 bytes, not {len(self.key)}")
        if not 0 < self.port < 65536:
            raise ValueError(f"a contact's port is between 1 and 65535, not {self.port}")
        if not _HOST.fullmatch(self.host):
            raise ValueError(f"not a host: {self.host[:80]!r}")

    node_id = _NodeId()

    @property
    def endpoint(self) -> str:
        """`host:port`, as people write it (an IPv6 host in brackets)."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of the same machine can reach it."""
        return is_loopback(self.host)

    @property
    def is_safe(self) -> bool:
        """Whether it may be called: encrypted, or without leaving this machine."""
        return self.secure or self.is_loopback

    def invitation(self) -> str:
        """The contact as text: `labkit://<public key>@host:port`, with `?plain` where it does not encrypt."""
        key = base64.urlsafe_b64encode(self.key).decode().rstrip("=")
        return f"{SCHEME}{key}@{self.endpoint}{'' if self.secure else '?plain'}"

    @classmethod
    def from_invitation(cls, text: str) -> Contact:
        """Parse an invitation. Raises `InviteError` that says what is wrong with the text."""
        form = "an invitation looks like labkit://<public key>@host:port"
        if not isinstance(text, str) or not text.strip().startswith(SCHEME):
            raise InviteError(f"{text!r} is not an invitation: {form}")
        rest, _, query = text.strip().removeprefix(SCHEME).partition("?")
        key_text, at, endpoint = rest.partition("@")
        host, colon, port = endpoint.rpartition(":")
        if not at or not colon or not host or not port.isdigit() or query not in ("", "plain"):
            raise InviteError(f"{text!r} is not an invitation: {form}")
        try:
            key = base64.urlsafe_b64decode(key_text + "=" * (-len(key_text) % 4))
            contact = cls(key, host.removeprefix("[").removesuffix("]"), int(port), secure=query != "plain")
        except (ValueError, binascii.Error) as error:
            raise InviteError(f"the invitation {text!r} is damaged ({error}); copy it whole") from None
        if not contact.is_safe:
            raise InviteError(f"the invitation {text!r} asks for an unencrypted connection to another machine; refused")
        return contact


@lru_cache(maxsize=1 << 14)
def shared(contact: Contact) -> Contact:
    """An equal contact that was met before, if any. Others name the same nodes again and again, and who remembers them
    is to hold each once."""
    return contact


@lru_cache(maxsize=1 << 14)
def node_id_of(key: bytes) -> int:
    """The 160-bit node id of a public key."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=ID_BITS // 8).digest(), "big")


@lru_cache(maxsize=1 << 14)
def is_loopback(host: str) -> bool:
    """Whether `host` names this machine only (127.0.0.0/8, ::1 or localhost)."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Invitation(str):
    """An invitation: a text, to be passed on. `note` says where it works, if that is not everywhere."""

    note: str

    def __new__(cls, contact: Contact) -> Invitation:
        self = super().__new__(cls, contact.invitation())
        self.note = LOOPBACK_NOTE if contact.is_loopback else ""
        return self

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self) + (f"\n{self.note}" if self.note else ""))
