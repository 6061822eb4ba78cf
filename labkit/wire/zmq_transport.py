"""Endpoints and links over ZeroMQ (`wire/transport` says what they promise), and the network that makes them.

A batch's request leaves this process by a `ZmqLink` and enters a server by a `ZmqEndpoint`. A node has one ROUTER that
others connect to and, for each node that it calls, a DEALER for control messages and one for bulk tensors, so that a
ping never queues behind 8 MB of tensors.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from labkit.contact import Address, Contact, is_loopback
from labkit.errors import ConnectionLost, LabkitError, NoWay
from labkit.wire.addresses import (
    LOOPBACK,
    announced_address,
    find_own_address,
    find_way,
    further_addresses,
    ports_of,
    resolve_to_listen,
    split_address,
)
from labkit.wire.frames import Frame, FrameLimits
from labkit.wire.security import Admission, Identity, answer_zap, must_encrypt
from labkit.wire.timers import Timers
from labkit.wire.transport import FindPassage, OnEnd, OnMessage, OnRequest, Peer
from labkit.wire.zmq_reports import read_monitor, user_id
from labkit.wire.zmq_socket import (
    FLUSH_TIME,
    Context,
    Socket,
    UnsentFrames,
    ZmqMessage,
    make_context,
    make_dealer,
    make_router,
    make_zap,
)

logger = logging.getLogger(__name__)

LOOPBACK_IP = "127.0.0.1"  # where unencrypted connections come from
TERM_TIMEOUT = 1.0  # seconds to wait for the end of ZeroMQ's own thread
FILES_PER_LINK = 4  # open files: a signal for each of its two sockets, the connection, and one from a peer to us
FEWEST_LINKS = 8  # however few files the system lets us open
MAX_UNSENT_PEERS = 256  # beyond, peers that left without taking their answers are looked for and forgotten


class ZmqLink:
    """A `Link` over a DEALER."""

    def __init__(
        self, contact: Contact, find_way: Callable[[], Awaitable[Address]], on_message: OnMessage, on_end: OnEnd
    ) -> None:
        self.contact = contact
        self._find_way = find_way
        self.error: LabkitError | None = None
        self._on_message = on_message
        self._on_end = on_end
        self._socket: Socket | None = None
        self._scope = trio.CancelScope()
        self._waiting: list[Callable[[], object]] = []  # actions for when there is a socket with room

    async def run(self, context: Context, identity: Identity, max_frame: int) -> None:
        """Find the way, connect, and watch the connection until it breaks or the link is closed."""
        secure, where = self.contact.secure, self.contact.endpoint
        sockets: list[Socket] = []
        try:
            with self._scope:
                host, port = await self._find_way()
                server_key = self.contact.key if secure else None
                sockets += make_dealer(context, host, port, identity, server_key, max_frame)
                socket, monitor = sockets
                socket.on_message, monitor.on_message = self._on_zmq_message, self._on_monitor_message
                self._socket = socket
                for action in self._waiting:
                    socket.when_writable(action)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(monitor.run)
                    await socket.run()
                    self.error = self.error or socket.error
                    nursery.cancel_scope.cancel()
        except LabkitError as error:
            self.error = error
        finally:
            self.error = self.error or ConnectionLost(f"the link to {where} is closed")
            if self._socket is not None:
                self._socket.fail(self.error)  # which delivers what has arrived
            self._waiting.clear()
            for socket in sockets:
                socket.close()
            self._on_end(self.error)

    def _on_zmq_message(self, message: ZmqMessage) -> None:
        self._on_message([frame.buffer for frame in message])

    def _on_monitor_message(self, message: ZmqMessage) -> None:
        """End the link if ZeroMQ reports that the connection failed or broke."""
        outcome = read_monitor(message, self.contact.endpoint, self.contact.secure)
        if outcome is not None:
            self.error = self.error or outcome
            self._scope.cancel()

    def send_nowait(self, frames: Sequence[Frame]) -> UnsentFrames | None:
        if self.error is not None:
            raise self.error
        return self._socket.send_nowait(frames) if self._socket is not None else None

    def when_ready(self, action: Callable[[], object]) -> None:
        if self._socket is None:
            self._waiting.append(action)
        else:
            self._socket.when_writable(action)

    def close(self) -> None:
        self._scope.cancel()


class ZmqEndpoint:
    """An `Endpoint` over a ROUTER. Made by `ZmqNetwork.listen`."""

    def __init__(
        self, network: ZmqNetwork, identity: Identity, contact: Contact, bound: tuple[str, int], socket: Socket,
        nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        self.contact = contact
        self.bound = bound
        self.identity = identity
        self.timers, self.direct = network.timers, network.direct
        self.find_passage: FindPassage | None = None
        self.most_links = max(FEWEST_LINKS, open_files() * 3 // 4 // FILES_PER_LINK)  # a quarter is for all else
        self._network = network
        self._socket = socket
        self._nursery = nursery
        self._unsent: dict[bytes, deque[UnsentFrames]] = {}

    def connect(self, contact: Contact, on_message: OnMessage, on_end: OnEnd) -> ZmqLink:
        network = self._network
        link = ZmqLink(contact, partial(self._find_any_way, contact), on_message, on_end)
        try:
            self._nursery.start_soon(link.run, network.context, self.identity, network.limits.message_bytes)
        except RuntimeError:  # the nursery has ended
            raise ConnectionLost(f"{contact.endpoint} was not called, as this node is closing") from None
        return link

    async def find_way(self, contact: Contact) -> Address:
        network = self._network
        if contact.key in network.direct and contact not in network.straight:
            return await find_way([network.direct[contact.key]])
        return await find_way(contact.addresses)

    async def _find_any_way(self, contact: Contact) -> Address:
        try:
            return await self.find_way(contact)
        except NoWay:
            at = None if self.find_passage is None else await self.find_passage(contact)
            if at is None:
                raise
            return at

    def move(self, contact: Contact) -> None:
        self.contact = contact

    async def serve(self, on_request: OnRequest) -> None:
        secure = self.contact.secure

        def on_message(message: ZmqMessage) -> None:
            route, *frames = message
            if frames:
                peer = Peer(route.bytes, *user_id(frames[0])) if secure else Peer(route.bytes, None, LOOPBACK_IP)
                on_request(peer, [frame.buffer for frame in frames])

        self._socket.on_message = on_message
        try:
            await self._socket.run_until_failure()
        finally:
            self._socket.on_message = None

    async def send(self, peer: Peer, frames: Sequence[Frame]) -> None:
        self._remember(peer, await self._socket.send([peer.route, *frames]))

    def send_nowait(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        try:
            unsent = self._socket.send_nowait([peer.route, *frames])
        except ConnectionLost:
            return True  # the peer is gone
        if unsent is not None:
            self._remember(peer, unsent)
        return unsent is not None

    def unsent_bytes(self, peer: Peer) -> int:
        waiting = self._unsent.get(peer.route)
        if waiting is None:
            return 0
        while waiting and waiting[0].done:
            waiting.popleft()
        if not waiting:
            del self._unsent[peer.route]
        return sum(unsent.bytes for unsent in waiting)

    def unsent_total(self) -> int:
        return sum(self.unsent_bytes(Peer(route)) for route in list(self._unsent))

    def _remember(self, peer: Peer, unsent: UnsentFrames) -> None:
        if unsent.done:
            return
        self._unsent.setdefault(peer.route, deque()).append(unsent)
        if len(self._unsent) > MAX_UNSENT_PEERS:
            self.unsent_total()  # which forgets those that have nothing unsent


class ZmqNetwork:
    """A network of ZeroMQ nodes in this trio run; `open_network` makes one.

    All nodes share its ZeroMQ context, its timers, and the task that answers who may connect (ZAP).

    Attributes:
        direct: Host and port at which this machine reaches a node of that key, whatever its contact says: for nodes of
            this machine that others reach through a relay, or through a router that may not lead back here.
        straight: Contacts that are called as they say all the same, to try whether that works.
    """

    tcp = True

    def __init__(self, context: Context, limits: FrameLimits) -> None:
        self.context = context
        self.limits = limits
        self.timers = Timers()
        self.direct: dict[bytes, tuple[str, int]] = {}
        self.straight: set[Contact] = set()
        self._admissions: dict[bytes, Admission] = {}
        self._domains = itertools.count()

    @asynccontextmanager
    async def listen(
        self,
        identity: Identity,
        address: str = LOOPBACK,
        *,
        announce: str | None = None,
        secure: bool | None = None,
        admission: Admission | None = None,
        toward: Sequence[Contact] = (),
    ) -> AsyncIterator[ZmqEndpoint]:
        """Listen at an address, for the length of the block.

        Args:
            identity: The keys of the node.
            address: `tcp://host:port`; port `*` for any that is free, `31000-31099` for the first free one of a range.
                Host 0.0.0.0 means all interfaces of IPv4, `[::]` those of IPv4 and IPv6.
            announce: The `host` or `host:port` that others should use, where that differs from what is bound. Needed
                behind a router. Where all interfaces are bound, one of their addresses is chosen: see
                `addresses.find_own_address`.
            secure: Whether connections are encrypted (CURVE). By default they are in private swarms, and in nodes that
                listen, or are announced, beyond loopback.
            admission: Who may connect; by default anybody.
            toward: Nodes that will be called: the address that is announced is that of the way to them.

        Raises:
            ValueError: The arguments do not go together.
            LabkitError: The address cannot be bound.
        """
        bind_host, bind_port = split_address(address)
        admission = admission or Admission()
        public = bind_host if announce is None else announced_address(announce, bind_host, 0)[0]
        secure = must_encrypt(secure, bind_host if is_loopback(public) else public, admission)
        domain = f"node-{next(self._domains)}".encode()
        self._admissions[domain] = admission
        try:
            ip = await resolve_to_listen(bind_host)
        except ConnectionLost as error:
            raise LabkitError(
                f"cannot listen on {address}: {error}; listen on an address of this machine, or on all of them: "
                "tcp://0.0.0.0:*"
            ) from None
        socket, host, port = make_router(
            self.context, ip, ports_of(bind_port), identity, secure=secure, domain=domain,
            max_frame=self.limits.message_bytes,
        )  # fmt: skip
        try:
            bound_to = host, port
            further: Sequence[str] = ()
            if announce is None:
                host = await find_own_address(host, toward)
                further = further_addresses(bound_to[0], host) if secure else ()
            host, port = announced_address(announce, host, port)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(socket.run)
                contact = Contact(identity.public_key, host, port, secure, tuple((ip, port) for ip in further))
                try:
                    yield ZmqEndpoint(self, identity, contact, bound_to, socket, nursery)
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            socket.close(FLUSH_TIME)
            del self._admissions[domain]

    async def _answer_zap(self, socket: Socket) -> None:
        while True:
            for message in await socket.receive():
                reply = answer_zap([frame.bytes for frame in message], self._admissions)
                if reply is not None:
                    await socket.send(reply)


@asynccontextmanager
async def open_network(limits: FrameLimits | None = None) -> AsyncIterator[ZmqNetwork]:
    """Open a network for the nodes of this trio run, for the length of the block. Closes all sockets at its end."""
    context = make_context()
    network = ZmqNetwork(context, limits or FrameLimits())
    zap = make_zap(context)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.timers.run)
            nursery.start_soon(zap.run)
            nursery.start_soon(network._answer_zap, zap)
            try:
                yield network
            finally:
                nursery.cancel_scope.cancel()
    finally:
        zap.close()
        await _terminate(context)


async def _terminate(context: Context) -> None:
    """End ZeroMQ's own thread. Its sockets are closed, so it only waits for the last replies to leave.

    It gets a deadline nevertheless. If that thread ever waits for something else, as it did before monitors were closed
    in time (`Socket.close`), a notebook must not wait with it.
    """
    with trio.CancelScope(shield=True, deadline=trio.current_time() + TERM_TIMEOUT) as scope:
        await trio.to_thread.run_sync(context.term, abandon_on_cancel=True)
    if scope.cancelled_caught:
        logger.info("ZeroMQ's thread did not end within %g s; it is left to the end of the process", TERM_TIMEOUT)


def open_files() -> int:
    """Returns how many files and sockets this process may have open."""
    try:
        import resource
    except ImportError:  # Windows, which sets no such limit
        return 1 << 16
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft == resource.RLIM_INFINITY else min(soft, 1 << 16)
