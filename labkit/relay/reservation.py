"""A port at a relay, as the hidden node holds it: what the hidden node does so that others reach it.

`hold_reservation` makes the reservation and serves through it until the relay is gone. Every connection is opened from
here: one to be told of callers, and for each caller one to the relay, spliced with one to our own listening socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from labkit.contact import Address, Contact
from labkit.errors import ConnectionLost, NotAdmitted, RPCError
from labkit.relay import messages
from labkit.relay.listening import connect_to
from labkit.relay.messages import (
    PING_PERIOD,
    SILENCE,
    Attach,
    Attached,
    BadRelayMessage,
    Bring,
    Fetch,
    MessageReader,
    Reserve,
    Reserved,
    ReserveFor,
    StillHere,
)
from labkit.relay.splice import Held, splice
from labkit.wire.addresses import find_way
from labkit.wire.rpc_types import Caller
from labkit.wire.zmq_transport import open_files

RESERVE_TIMEOUT = 3.0  # seconds for the call
MEMBER_TIME = 1.0  # seconds more if another one makes it
CONNECT_TIMEOUT = 3.0  # seconds for a connection to the relay
ATTACH_TIMEOUT = 3.0  # seconds for the relay's answer on it
LOCAL_TIMEOUT = 2.0  # seconds for a connection to our own socket
IDLE_TIMEOUT = 90.0  # seconds; the relay closes silent connections before
MAX_FETCHED = 1024  # connections at the same time, whatever the relay says
FILES_PER_CALLER = 6  # of those that the system lets us open: it takes three, and the node needs some for itself


@dataclass(frozen=True, slots=True)
class RelayedAddress:
    """Where callers reach a hidden node: a port at a relay."""

    relay: Contact
    port: int

    @property
    def host(self) -> str:
        """The relay's host."""
        return self.relay.host

    @property
    def also(self) -> Sequence[Address]:
        """The same port at the other addresses of the relay, as of the other IP version."""
        return tuple((host, self.port) for host, _ in self.relay.also)


async def hold_reservation(
    caller: Caller,
    relay: Contact,
    node: Contact,
    own: tuple[str, int],
    *,
    members: Sequence[Contact] = (),
    held: Held | None = None,
    task_status: trio.TaskStatus[RelayedAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be reached through a relay, until it is gone or this is cancelled.

    1. Find the way there, and ask it for a port, by a remote call. 2. Connect, and attach. 3. Fetch each caller of
    which it tells.

    Args:
        caller: Makes the call.
        relay: The relay.
        node: Our own node, as it is reached in its own network.
        own: Host and port of our own listening socket, as it is reached from this machine.
        members: Who may ask in our place, if the relay does not admit us: the notebook that has started this server.
        held: Counts the bytes that are held here.
        task_status: Started with the address when callers are let in there.

    Raises:
        RPCError: The relay does not take us, or is gone. The text says why.
    """
    host, _ = await find_way(relay.addresses)  # 1
    reserved = await _reserve(caller, relay, Reserve(node.key, node), members)
    stream = await connect_to(host, reserved.port, CONNECT_TIMEOUT)  # 2
    async with stream:
        reader = MessageReader(stream)
        try:
            with trio.fail_after(ATTACH_TIMEOUT):
                proof = messages.proof_of_attach(reserved.secret, reserved.id)
                await stream.send_all(messages.encode(Attach(reserved.id, proof)))
                if not isinstance(await reader.read(messages.FROM_RELAY), Attached):
                    raise ConnectionLost(f"the relay {relay.endpoint} did not let us attach")
            task_status.started(RelayedAddress(relay, reserved.callers_port))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_say_that_we_are_here, stream, nursery.cancel_scope)
                await _fetch_callers(reader, (host, reserved.port), reserved, own, held, nursery)  # 3
                nursery.cancel_scope.cancel()
        except trio.TooSlowError:
            raise ConnectionLost(f"the relay {relay.endpoint} did not answer within {ATTACH_TIMEOUT:g} s") from None
        except (BadRelayMessage, trio.BrokenResourceError) as error:
            raise ConnectionLost(f"the connection to the relay {relay.endpoint} broke ({error})") from None
    raise ConnectionLost(f"the relay {relay.endpoint} is gone")


async def _reserve(caller: Caller, relay: Contact, body: Reserve, members: Sequence[Contact]) -> Reserved:
    try:
        reply = await caller.call(relay, messages.RESERVE, body, returns=Reserved, timeout=RESERVE_TIMEOUT)
    except NotAdmitted as error:
        refused = error
    else:
        assert isinstance(reply.body, Reserved)
        return reply.body
    for member in members:
        with suppress(RPCError):
            ask = ReserveFor(relay, body)
            reply = await caller.call(
                member, messages.RESERVE_FOR, ask, returns=Reserved, timeout=RESERVE_TIMEOUT + MEMBER_TIME
            )
            assert isinstance(reply.body, Reserved)
            return reply.body
    raise refused


async def _say_that_we_are_here(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Say it until the relay takes no more, and end everything then."""
    try:
        while True:
            with trio.move_on_after(SILENCE) as limit:
                await stream.send_all(messages.encode(StillHere()))
            if limit.cancelled_caught:
                break
            await trio.sleep(PING_PERIOD)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


async def _fetch_callers(
    reader: MessageReader, relay: Address, reserved: Reserved, own: Address, held: Held | None,
    nursery: trio.Nursery,
) -> None:  # fmt: skip
    """Read what the relay says, and fetch its callers, until it is silent or gone."""
    fetched = trio.CapacityLimiter(max(1, min(MAX_FETCHED, open_files() // FILES_PER_CALLER)))

    async def fetch(id: bytes) -> None:
        try:
            await _fetch(relay, reserved, own, id, held)
        finally:
            fetched.release_on_behalf_of(id)

    while True:
        message: messages.FromRelay | None = None
        with trio.move_on_after(SILENCE), suppress(BadRelayMessage, trio.BrokenResourceError):
            message = await reader.read(messages.FROM_RELAY)
        if message is None:
            return
        if isinstance(message, Fetch):
            try:
                fetched.acquire_on_behalf_of_nowait(message.caller)
            except (trio.WouldBlock, RuntimeError):
                continue  # too many, or the same one again
            nursery.start_soon(fetch, message.caller)


async def _fetch(relay: Address, reserved: Reserved, own: Address, id: bytes, held: Held | None) -> None:
    """Fetch one caller: open both connections, say whom the first one is for, and splice them."""
    try:
        theirs = await connect_to(*relay, CONNECT_TIMEOUT)
        async with theirs:
            proof = messages.proof_of_bring(reserved.secret, reserved.id, id)
            with trio.fail_after(CONNECT_TIMEOUT):
                await theirs.send_all(messages.encode(Bring(reserved.id, id, proof)))
            ours = await connect_to(*own, LOCAL_TIMEOUT)
            await splice(ours, theirs, idle_timeout=IDLE_TIMEOUT, held=held)
    except (RPCError, trio.BrokenResourceError, trio.TooSlowError):
        pass  # the caller learns it when its connection is closed
