"""Joining a swarm, and saying why not: every way in which it can fail ends in a `JoinError` that a person can act on.

The steps are those of a connection, so the first that fails names the reason: 1. the name resolves, 2. something
listens at the port, 3. it holds the key of the invitation, admits ours and speaks our version.
"""

from __future__ import annotations

import trio

from labkit.contact import Contact
from labkit.dht.protocol import Ping, Pong
from labkit.errors import (
    ConnectionLost,
    DeadlineExceeded,
    HandshakeFailed,
    JoinError,
    NotAdmitted,
    RPCError,
    SecurityMismatch,
    VersionMismatch,
    WrongServerKey,
)
from labkit.wire.endpoint import resolve
from labkit.wire.rpc import Caller
from labkit.wire.security import key_text

JOIN_TIMEOUT = 8.0  # seconds for all three steps


async def check_reachable(caller: Caller, contact: Contact, own_key: bytes) -> None:
    """Return if a node of a swarm answers at `contact`. Raises `JoinError` that says why it does not."""
    where = contact.endpoint
    try:
        with trio.fail_after(JOIN_TIMEOUT):
            address = await resolve(contact.host)  # 1
            await _probe(address, contact)  # 2
            reply = await caller.call(contact, "dht.ping", Ping(None), returns=Pong, timeout=JOIN_TIMEOUT)  # 3
            if reply.body.key != contact.key:
                raise WrongServerKey("another node answered")
    except trio.TooSlowError:
        raise JoinError(
            f"{where} did not answer within {JOIN_TIMEOUT:.0f} s. Is the machine on, and does its firewall let "
            f"port {contact.port} through?{_loopback_hint(contact)}"
        ) from None
    except RPCError as error:
        raise JoinError(f"cannot join the swarm at {where}: {_explain(error, contact, own_key)}") from error


async def _probe(address: str, contact: Contact) -> None:
    try:
        stream = await trio.open_tcp_stream(address, contact.port)
    except OSError as error:
        reason = error.__cause__ or error
        raise ConnectionLost(f"nothing listens there ({reason})") from None
    await stream.aclose()


def _explain(error: RPCError, contact: Contact, own_key: bytes) -> str:
    """Why, and what to try."""
    if isinstance(error, NotAdmitted):
        return (
            "it is a private swarm and our key is not on its list. Ask its owner to add this key: "
            f"{key_text(own_key)} (a key that stays the same is made by `labkit keygen FILE` and given as key=FILE)"
        )
    if isinstance(error, WrongServerKey):
        return (
            "the node there does not hold the key of this invitation. Perhaps the swarm was restarted, or another "
            "program has the port now: ask for a fresh invitation"
        )
    if isinstance(error, SecurityMismatch):
        return f"{error}. The invitation is of another swarm: ask for a fresh one, and copy it whole, with its ending"
    if isinstance(error, HandshakeFailed):
        return f"{error}. Something listens there that is not labkit: check the port, or ask for a fresh invitation"
    if isinstance(error, VersionMismatch):
        return str(error)
    if isinstance(error, DeadlineExceeded):
        return "a connection was made but no answer came. The node may be stopped or overloaded: try again"
    if "resolve" in str(error):
        return f"{error}. Check the spelling, or use the IP address"
    if isinstance(error, ConnectionLost):
        return (
            f"{error}. Is the swarm still running? Ask for a fresh invitation, since a restarted swarm has another port"
            f"{_loopback_hint(contact)}"
        )
    return str(error)


def _loopback_hint(contact: Contact) -> str:
    return f". {LOOPBACK_NOTE}" if contact.is_loopback else ""


LOOPBACK_NOTE = (
    "This invitation is for the same machine only, since the swarm listens on loopback; to be reached from other "
    'machines, start it with listen="tcp://0.0.0.0:*" (labkit serve --listen tcp://0.0.0.0:*) and, behind a router, '
    'announce="HOST:PORT"'
)
