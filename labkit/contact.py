"""Contacts: the public key and the address of a node. An invitation is a contact as text.

The DHT's routing tables hold contacts, and an expert's record points to one. A node id is the hash of the public key,
so a peer proves its id by the CURVE handshake.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import re
from functools import lru_cache
from typing import Annotated, Any

import msgspec

from labkit.errors import InviteError

ID_BITS = 160
SCHEME = "labkit://"
LOOPBACK_NOTE = (
    "This invitation is for the same machine only, since the swarm listens on loopback; to be reached from other "
    'machines, start it with listen="tcp://0.0.0.0:*" (labkit serve --listen tcp://0.0.0.0:*) and, behind a router, '
    'announce="HOST:PORT"'
)
LOOPBACK_HINT = (
    "An invitation with a loopback address is for the same machine only, on which it was made. For others, ask for a "
    'fresh one, of a swarm that was started with listen="tcp://0.0.0.0:*" (labkit serve --listen tcp://0.0.0.0:*) on a '
    "machine that is connected to a network"
)
MAX_ALSO = 4  # further addresses of a contact
Address = tuple[str, int]  # host and port
_HOST = re.compile(r"[\w.:%-]{1,255}")  # no control characters, which a terminal would obey
_PORT = re.compile(r"[0-9]{1,5}")


class _NodeId:
    """The 160-bit Kademlia id: the hash of the public key.

    It is computed when it is first read, as by `cached_property`, but without a lock, since there are many contacts.
    """

    def __get__(self, contact: Contact, owner: type[Contact]) -> int:
        value: int = contact.__dict__.setdefault("node_id", node_id_of(contact.key))
        return value


class Contact(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """A node's public key and addresses. `secure` says whether connections to it are encrypted (CURVE).

    `also` are further IP addresses, with ports, at which the same node is reached, as over IPv4 and over IPv6. Who
    calls it takes the first of all of them to which there is a way.
    """

    key: bytes  # 32 bytes, CURVE25519 public key
    host: str
    port: int
    secure: bool = True
    also: Annotated[tuple[Address, ...], msgspec.Meta(max_length=MAX_ALSO)] = ()

    def __post_init__(self) -> None:
        if len(self.key) != 32:
            raise ValueError(f"a contact's key has 32 bytes, not {len(self.key)}")
        if not is_host(self.host):
            raise ValueError(f"not a host: {self.host[:80]!r}")
        _check_port(self.port)
        if self.also:
            self._check_further()

    def _check_further(self) -> None:
        """Further addresses are few, and none is of another kind than the first, which says who may be called there."""
        if len(self.also) > MAX_ALSO:
            raise ValueError(f"a contact has at most {MAX_ALSO} further addresses, not {len(self.also)}")
        for host, port in self.also:
            _check_port(port)
            if not is_further_address(host):
                raise ValueError(f"not a further IP address of a contact: {host[:80]!r}")
            if is_loopback(host) is not is_loopback(self.host):
                raise ValueError("a contact's addresses are loopback ones, or none of them is")

    node_id = _NodeId()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """All addresses, in the order in which they are to be tried."""
        return (self.host, self.port), *self.also

    @property
    def endpoint(self) -> str:
        """The first address: `host:port`, as people write it (an IPv6 host in brackets)."""
        return endpoint_of(self.host, self.port)

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of the same machine can reach the node."""
        return is_loopback(self.host)

    @property
    def is_safe(self) -> bool:
        """Whether the node may be called: encrypted, or without leaving this machine."""
        return self.secure or self.is_loopback

    def invitation(self) -> str:
        """Returns the contact as text: `labkit://<public key>@host:port`, with `?plain` if it does not encrypt.

        Further addresses follow the first one: `labkit://<public key>@host:port,[IPv6 host]:port`.
        """
        key = base64.urlsafe_b64encode(self.key).decode().rstrip("=")
        where = ",".join(endpoint_of(*address) for address in self.addresses)
        return f"{SCHEME}{key}@{where}{'' if self.secure else '?plain'}"

    @classmethod
    def from_invitation(cls, text: str) -> Contact:
        """Parse an invitation. Raises `InviteError` that says what is wrong with the text."""
        form = "an invitation looks like labkit://<public key>@host:port"
        if not isinstance(text, str) or not text.strip().startswith(SCHEME):
            raise InviteError(f"{text!r} is not an invitation: {form}")
        rest, _, query = text.strip().removeprefix(SCHEME).partition("?")
        key_text, at, endpoints = rest.partition("@")
        parts = [endpoint.rpartition(":") for endpoint in endpoints.split(",")]
        if not at or query not in ("", "plain") or not all(host and _PORT.fullmatch(port) for host, _, port in parts):
            raise InviteError(f"{text!r} is not an invitation: {form}")
        try:
            key = base64.urlsafe_b64decode(key_text + "=" * (-len(key_text) % 4))
            first, *also = ((host.removeprefix("[").removesuffix("]"), int(port)) for host, _, port in parts)
            contact = cls(key, *first, secure=query != "plain", also=tuple(also))
        except (ValueError, binascii.Error) as error:
            raise InviteError(f"the invitation {text!r} is damaged ({error}); copy it whole") from None
        if not contact.is_safe:
            raise InviteError(f"the invitation {text!r} asks for an unencrypted connection to another machine; refused")
        return contact


@lru_cache(maxsize=1 << 14)
def intern_contact(contact: Contact) -> Contact:
    """Returns an equal contact that was seen before, if there is one, so that each is in memory once.

    Peers name the same nodes again and again.
    """
    return contact


@lru_cache(maxsize=1 << 14)
def node_id_of(key: bytes) -> int:
    """Returns the 160-bit node id of a public key."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=ID_BITS // 8).digest(), "big")


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError(f"a contact's port is between 1 and 65535, not {port}")


def is_host(host: str) -> bool:
    """Whether this may be a contact's host: a name or an IP address."""
    return _HOST.fullmatch(host) is not None


def endpoint_of(host: str, port: int) -> str:
    """Returns `host:port`, as people write it (an IPv6 host in brackets)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@lru_cache(maxsize=1 << 14)
def is_further_address(host: str) -> bool:
    """Whether this may be a further address of a contact: an IP address, written plainly, that others can call."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    plain = not isinstance(ip, ipaddress.IPv6Address) or (ip.ipv4_mapped is None and ip.scope_id is None)
    return plain and not (ip.is_unspecified or ip.is_multicast or ip.is_link_local)


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
    """An invitation to a swarm: a text to pass on. `note` says where it works, if that is not everywhere."""

    note: str

    def __new__(cls, contact: Contact, note: str | None = None) -> Invitation:
        """Make an invitation.

        Args:
            contact: The node to join.
            note: Where it works; by default what is to be said of a loopback address.
        """
        self = super().__new__(cls, contact.invitation())
        self.note = note if note is not None else LOOPBACK_NOTE if contact.is_loopback else ""
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # another process gets the text alone

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self) + (f"\n{self.note}" if self.note else ""))
