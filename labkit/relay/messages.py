"""What a relay and its clients say to each other, and how it is told apart from what is relayed.

A client first makes a remote call, `relay.reserve`, which is encrypted and proves its key. The answer has the ports and
a secret. Then it opens TCP connections to the relay, each of which begins with a message of the client's:

    control connection      client: Attach.  relay: Attached, and Fetch for each caller.  both: StillHere, every second
    connection to a caller  client: Bring, and from then on all bytes are the caller's

A message is two bytes of length and a msgpack body, at most `MAX_MESSAGE` bytes. These connections are not encrypted:
what they carry for others is, and who reads along can neither attach nor fetch, since that takes a proof (HMAC) made
with the secret, and each proof serves once.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Annotated, Protocol, TypeVar

import msgspec
import trio
from msgspec import Meta

from labkit.contact import Contact
from labkit.errors import LabkitError

RESERVE = "relay.reserve"  # a method
RESERVE_FOR = "relay.reserve_for"  # asks a member of the swarm to make that call, for a server that it has started
NEIGHBOURS = "relay.neighbours"  # another: clients that the relay sees come from the same address
MAX_NEIGHBOURS = 16
PASSAGE = "relay.passage"  # another: a port that leads to a node to which the caller has no way
MAX_MESSAGE = 256  # bytes
PING_PERIOD = 1.0  # seconds between two messages on a control connection
SILENCE = 4.0  # seconds without any after which the other side counts as gone
HELLO_TIMEOUT = 5.0  # seconds that a new connection has for its first message

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Secret = Annotated[bytes, Meta(min_length=32, max_length=32)]
Port = Annotated[int, Meta(ge=1, le=65535)]
_LENGTH = struct.Struct("!H")


class Reserve(msgspec.Struct, frozen=True, array_like=True):
    """The body of `relay.reserve`: who asks for a port, as it is reached in its own network, if that is known."""

    key: Secret
    direct: Contact | None = None


class ReserveFor(msgspec.Struct, frozen=True, array_like=True):
    """The body of `relay.reserve_for`: which relay to ask, and what."""

    relay: Contact
    reserve: Reserve


class Reserved(msgspec.Struct, frozen=True, array_like=True):
    """The answer to it.

    Args:
        id: Names the reservation.
        secret: For proofs.
        port: The relay's port for its clients.
        callers_port: The port at which callers reach this client.
    """

    id: Id
    secret: Secret
    port: Port
    callers_port: Port


class AskNeighbours(msgspec.Struct, frozen=True, array_like=True):
    """The body of `relay.neighbours`: whose neighbours are asked for."""

    key: Secret


class Neighbours(msgspec.Struct, frozen=True, array_like=True):
    """The answer to it: nodes behind the same router, probably, as they are reached in their own network."""

    contacts: Annotated[list[Contact], Meta(max_length=MAX_NEIGHBOURS)]


class AskPassage(msgspec.Struct, frozen=True, array_like=True):
    """The body of `relay.passage`: to which node, by IP address."""

    target: Contact


class Passage(msgspec.Struct, frozen=True, array_like=True):
    """The answer to it: the relay's port that leads there; 0 if no node answers there that holds the key."""

    port: Annotated[int, Meta(ge=0, le=65535)]


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    """The client's first message on its control connection."""

    reservation: Id
    proof: Secret


class Bring(msgspec.Struct, frozen=True, array_like=True, tag="bring"):
    """The client's only message on a connection for a caller."""

    reservation: Id
    caller: Id
    proof: Secret


class Attached(msgspec.Struct, frozen=True, array_like=True, tag="attached"):
    """The relay's answer to `Attach`: callers are let in from now on."""


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag="fetch"):
    """The relay tells its client of a caller, which is to be fetched by a `Bring`."""

    caller: Id


class StillHere(msgspec.Struct, frozen=True, array_like=True, tag="here"):
    """Either side says that it is there."""


Hello = Attach | Bring
FromRelay = Attached | Fetch | StillHere
HELLO: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
FROM_RELAY: msgspec.msgpack.Decoder[FromRelay] = msgspec.msgpack.Decoder(FromRelay)
STILL_HERE: msgspec.msgpack.Decoder[StillHere] = msgspec.msgpack.Decoder(StillHere)
M = TypeVar("M", covariant=True)


class BadRelayMessage(LabkitError):
    """These bytes are no message between a relay and its client, or the connection ended within one."""


class Decoder(Protocol[M]):
    """What reads a body: a msgspec decoder."""

    def decode(self, body: bytes, /) -> M: ...


def encode(message: msgspec.Struct) -> bytes:
    """Returns a message as it is sent."""
    body = msgspec.msgpack.encode(message)
    assert len(body) <= MAX_MESSAGE
    return _LENGTH.pack(len(body)) + body


class MessageReader:
    """Reads messages from a stream.

    Attributes:
        rest: Bytes that were read beyond the last message.
    """

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self.rest = b""
        self._stream = stream

    async def read(self, decoder: Decoder[M]) -> M | None:
        """Read a message. Returns None if the stream has ended before it.

        Raises:
            BadRelayMessage: What came is none.
            trio.BrokenResourceError: The connection is broken.
        """
        head = await self._take(_LENGTH.size)
        if head is None:
            return None
        (size,) = _LENGTH.unpack(head)
        if not 0 < size <= MAX_MESSAGE:
            raise BadRelayMessage(f"a message of {size} bytes; at most {MAX_MESSAGE}")
        body = await self._take(size)
        if body is None:
            raise BadRelayMessage("the connection ended within a message")
        try:
            return decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise BadRelayMessage(f"not a message of a relay or its client: {error}") from None

    async def _take(self, size: int) -> bytes | None:
        while len(self.rest) < size:
            part = await self._stream.receive_some(2 * MAX_MESSAGE)
            if not part:
                if self.rest:
                    raise BadRelayMessage("the connection ended within a message")
                return None
            self.rest += part
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken


def proof_of_attach(secret: bytes, reservation: bytes) -> bytes:
    """Returns what proves that whoever attaches has been given the secret."""
    return _proof(secret, b"attach", reservation)


def proof_of_bring(secret: bytes, reservation: bytes, caller: bytes) -> bytes:
    """Returns what proves the same of whoever fetches a caller."""
    return _proof(secret, b"bring", reservation + caller)


def same_proof(one: bytes, other: bytes) -> bool:
    """Whether two proofs are the same, in a time that tells nothing about them."""
    return hmac.compare_digest(one, other)


def _proof(secret: bytes, purpose: bytes, of: bytes) -> bytes:
    return hmac.digest(secret, b"labkit relay " + purpose + b" " + of, hashlib.sha256)
