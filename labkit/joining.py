"""Joining a swarm: whether its node can be reached, and if not, why.

Every way in which joining can fail ends in a `JoinError` that a person can act on. The steps are those of a connection,
so that the first one that fails names the reason:

1. the name resolves, and there is a way to an address,
2. something listens at the port,
3. it greets as ZeroMQ does, with or without encryption as the invitation says,
4. it holds the key of the invitation, admits our key and speaks our version of the protocol.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import trio

from labkit.contact import LOOPBACK_HINT, Address, Contact
from labkit.dht.protocol import Ping, Pong
from labkit.errors import (
    ConnectionLost,
    HandshakeFailed,
    JoinError,
    NotAdmitted,
    NoWay,
    RPCError,
    SecurityMismatch,
    WrongServerKey,
)
from labkit.wire.addresses import find_way, own_addresses
from labkit.wire.rpc_types import Caller
from labkit.wire.security import key_text

JOIN_TIMEOUT = 8.0  # seconds for all four steps
PING_TIMEOUT = 1.0  # seconds; a node that has not answered by then counts as alive
UNREACHABLE_ERRNOS = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL}

# ZMTP (ZeroMQ RFC 23): a greeting is 64 bytes of signature, version, mechanism and padding. The first 11 bytes of ours
# are enough to be sent the whole of theirs.
ZMTP_SIGNATURE = b"\xff\0\0\0\0\0\0\0\x01\x7f"
GREETING_SIZE = 64  # bytes


async def check_reachable(caller: Caller, contact: Contact, own_key: bytes, *, tcp: bool = True) -> None:
    """Check that a node of a swarm answers at `contact`.

    Args:
        caller: Makes the call of step 4.
        contact: The node to reach.
        own_key: Our public key, which a private swarm has to admit.
        tcp: Whether the network is TCP's, so that steps 1 to 3 can be checked one by one.

    Raises:
        JoinError: It does not answer; the text says why, and what to try.
    """
    failure = await _why_unreachable(caller, contact, own_key, tcp)
    if failure is not None:
        raise JoinError(f"cannot join the swarm at {contact.endpoint}: {failure.text}") from failure.cause


async def describe_unreachable(caller: Caller, contact: Contact, own_key: bytes) -> str:
    """Say why a node cannot be reached, and what to try; an empty text if it answers. See `check_reachable`."""
    failure = await _why_unreachable(caller, contact, own_key, True)
    return "" if failure is None else failure.text


async def check_announced(caller: Caller, contact: Contact, announce: str) -> str:
    """Check that our own node is reached at the address that it announces.

    Args:
        caller: Calls it there, over a connection of its own.
        contact: Our own node, as it announces itself.
        announce: What the user gave.

    Returns:
        Why this machine does not reach it there, if others may all the same: not every router leads back to who is
        behind it. Empty if it does.

    Raises:
        ValueError: Nobody can; the text says why, and what to try.
    """
    failure = await _why_unreachable(caller, contact, contact.key, True)
    if failure is None:
        return ""
    taken = isinstance(failure.cause, WrongServerKey)
    what = "another node answers there" if taken else failure.what
    if not (taken or failure.no_name or contact.is_loopback or contact.host in own_addresses()):
        return what
    raise ValueError(
        f"announce={announce!r}: by this, our own node would be reached at {contact.endpoint}, and it is not, not "
        f"even from this machine: {what}. Give the HOST or HOST:PORT at which this machine is reached; "
        "behind a router that is the router's address, with a port that it forwards to this machine"
    )


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a node cannot be reached, and what to try."""

    what: str
    hint: str
    cause: RPCError | None = None
    no_name: bool = False  # its name does not resolve

    @property
    def text(self) -> str:
        return f"{self.what}. {self.hint}".strip()


class _Unreachable(Exception):
    """A step has failed."""

    def __init__(self, what: str, hint: str, no_name: bool = False) -> None:
        super().__init__(what)
        self.failure = _Failure(what, hint, no_name=no_name)


async def _why_unreachable(caller: Caller, contact: Contact, own_key: bytes, tcp: bool) -> _Failure | None:
    """Walk through the four steps. Returns what failed, or None."""
    late = _Failure(f"the name was not resolved within {JOIN_TIMEOUT:g} s", "Check the network, or use the IP address")
    try:
        with trio.fail_after(JOIN_TIMEOUT):
            if tcp:
                address = await _find_way(contact)  # 1
                late = _Failure(
                    f"nothing answered within {JOIN_TIMEOUT:g} s",
                    f"Is the machine on, does its firewall let port {contact.port} through, and is that the address "
                    f"at which it is reached (its announce=…)? {_hint(contact)}",
                )
                stream = await _connect(address, contact)  # 2
                late = _Failure(
                    f"something accepts connections but said nothing within {JOIN_TIMEOUT:g} s",
                    "A node that is suspended or overloaded does that: try again, or ask for the invitation of another "
                    "node; or it is not labkit",
                )
                async with stream:
                    await _read_greeting(stream, contact)  # 3
            late = _Failure(
                f"ZeroMQ is there, but no answer came within {JOIN_TIMEOUT:g} s",
                "It is a node that is overloaded: try again; or another program's: ask for a fresh invitation",
            )
            reply = await caller.call(contact, "dht.ping", Ping(None), returns=Pong, timeout=2 * JOIN_TIMEOUT)  # 4
            if reply.body.key != contact.key:
                raise WrongServerKey("another node answered")
    except trio.TooSlowError:
        return late
    except _Unreachable as error:
        return error.failure
    except RPCError as error:
        what, hint = _explain(error, contact, own_key)
        return _Failure(what, hint, error)
    return None


async def _find_way(contact: Contact) -> Address:
    try:
        return await find_way(contact.addresses)
    except NoWay as error:
        raise _Unreachable(
            f"there is no way there: {error}",
            "Check the network, and join by the invitation of a node to which there is a way, as that of such a relay",
        ) from None
    except ConnectionLost as error:
        raise _Unreachable(
            str(error),
            "Check the spelling, or use the IP address. If the invitation was copied as it is, whoever started the "
            "swarm gave it a wrong name (announce=…)",
            no_name=True,
        ) from None


async def is_alive(caller: Caller, contact: Contact) -> bool:
    """Whether a node that is known from before is still there. One that is slow or overloaded counts as alive.

    Args:
        caller: Makes the call.
        contact: The node.
    """
    for _ in range(2):  # the first call may go over a connection to a node that has been restarted since
        try:
            reply = await caller.call(contact, "dht.ping", Ping(None), returns=Pong, timeout=PING_TIMEOUT)
            return bool(reply.body.key == contact.key)  # else another node has its address now
        except (WrongServerKey, SecurityMismatch):
            return False
        except NotAdmitted:
            return True
        except ConnectionLost:
            continue
        except RPCError:
            return True
    return False


async def _connect(address: Address, contact: Contact) -> trio.SocketStream:
    family = trio.socket.AF_INET6 if ":" in address[0] else trio.socket.AF_INET
    socket = trio.socket.socket(family, trio.socket.SOCK_STREAM)
    try:
        await socket.connect(address)
    except OSError as error:
        socket.close()
        reason = os.strerror(error.errno or 0)
        if error.errno in UNREACHABLE_ERRNOS:
            raise _Unreachable(f"there is no way to that address ({reason})", "Check the network") from None
        raise _Unreachable(
            f"nothing listens there ({reason})",
            "Is the swarm still running? If it was restarted, it may have another port: ask for a fresh invitation. If "
            f"it runs, the address that it was started with (announce=…, --announce) is wrong. {_hint(contact)}",
        ) from None
    except BaseException:
        socket.close()
        raise
    return trio.SocketStream(socket)


async def _read_greeting(stream: trio.SocketStream, contact: Contact) -> None:
    greeting = b""
    try:
        await stream.send_all(ZMTP_SIGNATURE + b"\x03")
        while len(greeting) < GREETING_SIZE and (part := await stream.receive_some()):
            greeting += part
    except trio.BrokenResourceError:
        pass
    if len(greeting) < GREETING_SIZE or (greeting[0], greeting[9], greeting[10]) != (0xFF, 0x7F, 3):
        raise HandshakeFailed("what listens there does not speak ZeroMQ")
    encrypts = greeting[12:32].rstrip(b"\0") == b"CURVE"
    if encrypts and not contact.secure:
        raise SecurityMismatch("it encrypts its connections, and the invitation says that it does not")
    if contact.secure and not encrypts:
        raise SecurityMismatch("it does not encrypt its connections, and the invitation says that it does")


def _explain(error: RPCError, contact: Contact, own_key: bytes) -> tuple[str, str]:
    """Returns why steps 3 or 4 failed, and what to try."""
    if isinstance(error, NotAdmitted):
        return (
            "it is a private swarm and our key is not on its list",
            f"Ask its owner to add this key: {key_text(own_key)} (a key that stays the same is made by `labkit keygen "
            "FILE` and given as key=FILE)",
        )
    if isinstance(error, WrongServerKey):
        return (
            "the node there does not hold the key of this invitation",
            "Perhaps the swarm was restarted, another node or program has the port now, or the address that the swarm "
            "announces is another machine's: ask for a fresh invitation, and whether its announce=… is right",
        )
    if isinstance(error, SecurityMismatch):
        return str(error), "Ask for a fresh invitation, and copy it whole, with its ending"
    if isinstance(error, HandshakeFailed):
        return str(error), "It is not labkit, then: check the port, or ask for a fresh invitation"
    return str(error), ""


def _hint(contact: Contact) -> str:
    return LOOPBACK_HINT if contact.is_loopback else ""
