"""The seam between remote calls and the network: a node's endpoint, and links from it to other nodes.

`Endpoint` and `Link` move frames and know nothing of calls. Over ZeroMQ a node has one ROUTER that others connect to
and, for each node that it calls, a DEALER for control messages and one for bulk tensors, so that a ping never queues
behind 8 MB. The same two protocols are what a simulated network has to offer.
"""

from __future__ import annotations

import ipaddress
import itertools
import socket as stdlib_socket
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from labkit.contact import Contact, is_loopback
from labkit.errors import ConnectionLost, LabkitError
from labkit.wire.frames import Frame, FrameLimits
from labkit.wire.security import Admission, Identity, answer_zap
from labkit.wire.sockets import (
    FLUSH_TIME,
    Context,
    Socket,
    Unsent,
    make_context,
    make_dealer,
    make_router,
    make_zap,
    read_monitor,
    user_id,
)

LOOPBACK = "tcp://127.0.0.1:*"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a request: the connection it came on and, over CURVE, the public key that the handshake proved."""

    route: bytes
    key: bytes | None = None


class Link(Protocol):
    """A connection to one node. It is made in the background and never made again: when it breaks it is over."""

    error: LabkitError | None  # why the link is over, None while it is not

    async def send(self, frames: Sequence[Frame]) -> None:
        """Wait until the connection is there and has room. Raises `ConnectionLost` (or a kind of it)."""

    def send_nowait(self, frames: Sequence[Frame]) -> None:
        """Send if that is possible at once; else do nothing."""

    async def receive(self) -> Sequence[Sequence[Frame]]:
        """All messages that have arrived, at least one. Raises like `send`, after the last message."""

    def close(self) -> None:
        """End the connection."""


class Endpoint(Protocol):
    """One node's place on the network."""

    contact: Contact

    def connect(self, contact: Contact) -> Link:
        """A new link to a node; returns at once."""

    async def receive(self) -> Sequence[tuple[Peer, Sequence[Frame]]]:
        """All requests that have arrived, at least one."""

    async def send(self, peer: Peer, frames: Sequence[Frame]) -> None:
        """Answer a peer, waiting for room. Raises `ConnectionLost` if it is gone."""

    def send_nowait(self, peer: Peer, frames: Sequence[Frame]) -> None:
        """Answer a peer if that is possible at once; else do nothing."""

    def unsent_bytes(self, peer: Peer) -> int:
        """Size of the answers that this peer has not taken yet."""


# ---------------------------------------------------------------- over ZeroMQ


class ZmqLink:
    """A `Link` over a DEALER."""

    def __init__(self, contact: Contact) -> None:
        self.contact = contact
        self.error: LabkitError | None = None
        self._socket: Socket | None = None
        self._scope = trio.CancelScope()
        self._opened = trio.Event()

    async def run(self, context: Context, identity: Identity, max_frame: int) -> None:
        """Resolve the name, connect, and watch the connection until it breaks or the link is closed."""
        secure, where = self.contact.secure, self.contact.endpoint
        sockets: list[Socket] = []
        try:
            with self._scope:
                host = await resolve(self.contact.host)
                server_key = self.contact.key if secure else None
                self._socket, monitor = make_dealer(context, host, self.contact.port, identity, server_key, max_frame)
                sockets += self._socket, monitor
                self._opened.set()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._socket.run)
                    nursery.start_soon(monitor.run)
                    await self._watch(monitor)
                    nursery.cancel_scope.cancel()
        except LabkitError as error:
            self.error = error
        finally:
            self.error = self.error or ConnectionLost(f"the link to {where} is closed")
            if self._socket is not None:
                self._socket.fail(self.error)  # after this a reader takes what has arrived, then gets the error
            self._opened.set()
            for socket in sockets:
                socket.close()

    async def _watch(self, monitor: Socket) -> None:
        """Until ZeroMQ says that the connection failed or broke; `error` says how."""
        while self.error is None:
            try:
                messages = await monitor.receive()
            except LabkitError as error:
                self.error = error
                return
            for message in messages:
                outcome = read_monitor(message, self.contact.endpoint, self.contact.secure)
                self.error = self.error or outcome

    async def send(self, frames: Sequence[Frame]) -> None:
        await self._opened.wait()
        if self._socket is None:
            raise self.error or ConnectionLost("the link is closed")
        await self._socket.send(frames)

    def send_nowait(self, frames: Sequence[Frame]) -> None:
        if self._socket is not None and self.error is None:
            self._socket.send_nowait(frames)

    async def receive(self) -> Sequence[Sequence[Frame]]:
        await self._opened.wait()
        if self._socket is None:
            raise self.error or ConnectionLost("the link is closed")
        return [[frame.buffer for frame in message] for message in await self._socket.receive()]

    def close(self) -> None:
        self._scope.cancel()


class ZmqEndpoint:
    """An `Endpoint` over a ROUTER. Made by `ZmqNetwork.listen`."""

    def __init__(
        self, network: ZmqNetwork, identity: Identity, contact: Contact, socket: Socket, nursery: trio.Nursery
    ) -> None:
        self.contact = contact
        self.identity = identity
        self._network = network
        self._socket = socket
        self._nursery = nursery
        self._unsent: dict[bytes, deque[Unsent]] = {}

    def connect(self, contact: Contact) -> ZmqLink:
        link = ZmqLink(contact)
        self._nursery.start_soon(link.run, self._network.context, self.identity, self._network.limits.message_bytes)
        return link

    async def receive(self) -> Sequence[tuple[Peer, Sequence[Frame]]]:
        burst = await self._socket.receive()
        return [
            (Peer(route.bytes, user_id(frames[0]) if self.contact.secure else None), [f.buffer for f in frames])
            for route, *frames in burst
            if frames
        ]

    async def send(self, peer: Peer, frames: Sequence[Frame]) -> None:
        self._remember(peer, await self._socket.send([peer.route, *frames]))

    def send_nowait(self, peer: Peer, frames: Sequence[Frame]) -> None:
        try:
            self._socket.send_nowait([peer.route, *frames])
        except ConnectionLost:
            pass  # nobody is left to hear it

    def unsent_bytes(self, peer: Peer) -> int:
        waiting = self._unsent.get(peer.route)
        if waiting is None:
            return 0
        while waiting and waiting[0].done:
            waiting.popleft()
        if not waiting:
            del self._unsent[peer.route]
        return sum(unsent.bytes for unsent in waiting)

    def _remember(self, peer: Peer, unsent: Unsent) -> None:
        if unsent.done:
            return
        self._unsent.setdefault(peer.route, deque()).append(unsent)
        if len(self._unsent) > 256:  # peers that left without taking their answers
            for route in list(self._unsent):
                self.unsent_bytes(Peer(route))


class ZmqNetwork:
    """A ZeroMQ context and the task that answers who may connect. One serves all nodes of a lab thread."""

    def __init__(self, context: Context, limits: FrameLimits) -> None:
        self.context = context
        self.limits = limits
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
    ) -> AsyncIterator[ZmqEndpoint]:
        """Bind a node to `address` (`tcp://host:port`, port `*` for any).

        `announce`: the `host` or `host:port` that others should use, where that differs from what is bound (needed
        behind a router; guessed for 0.0.0.0). `secure`: CURVE; on by default beyond loopback and for private swarms.
        Raises `ValueError` for arguments that do not go together, `LabkitError` if the address cannot be had.
        """
        bind_host, bind_port = split_address(address)
        admission = admission or Admission()
        wide = not is_loopback(bind_host)
        if secure is False and (wide or not admission.is_open):
            raise ValueError(
                "secure=False is for open swarms on loopback only: beyond it every connection is encrypted"
            )
        secure = bool(secure) or wide or not admission.is_open
        domain = f"node-{next(self._domains)}".encode()
        self._admissions[domain] = admission
        bound = f"tcp://{await resolve(bind_host)}:{bind_port}"
        socket, host, port = make_router(
            self.context, bound, identity, secure=secure, domain=domain, max_frame=self.limits.message_bytes
        )
        try:
            host, port = _announced(announce, host, port)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(socket.run)
                contact = Contact(identity.public_key, host, port, secure)
                try:
                    yield ZmqEndpoint(self, identity, contact, socket, nursery)
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
    """A network for the nodes of this trio run; closes every socket at the end."""
    context = make_context()
    network = ZmqNetwork(context, limits or FrameLimits())
    zap = make_zap(context)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(zap.run)
            nursery.start_soon(network._answer_zap, zap)
            try:
                yield network
            finally:
                nursery.cancel_scope.cancel()
    finally:
        zap.close()
        context.term()


# ---------------------------------------------------------------- addresses


def split_address(address: str) -> tuple[str, str]:
    """`tcp://host:port` as host and port (a number or `*`). Raises `ValueError`."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    if not address.startswith("tcp://") or not host or not (port == "*" or (port.isdigit() and int(port) < 65536)):
        raise ValueError(f"listen={address!r} is not an address; write tcp://HOST:PORT, for example tcp://0.0.0.0:*")
    return host, port


async def resolve(host: str) -> str:
    """The IP address of a host. Raises `ConnectionLost` if there is none."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        ipaddress.ip_address(host)
        return host
    except ValueError:
        pass
    try:
        found = await trio.socket.getaddrinfo(host, None, type=stdlib_socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectionLost(f"the name {host} does not resolve ({error})") from None
    return str(found[0][4][0])


def _announced(announce: str | None, host: str, port: int) -> tuple[str, int]:
    """The host and port to put into the contact of a node that is bound to `host` and `port`."""
    if announce is None:
        return (_own_address() if ipaddress.ip_address(host).is_unspecified else host), port
    name, colon, announced_port = announce.rpartition(":")
    if not colon or (":" in name and "[" not in name):  # no port, or an IPv6 address
        return announce.strip("[]"), port
    if not announced_port.isdigit():
        raise ValueError(f"announce={announce!r} is not an address; write HOST or HOST:PORT")
    return name.strip("[]"), int(announced_port)


def _own_address() -> str:
    """This machine's address on the interface of its default route; loopback if it has none."""
    with stdlib_socket.socket(stdlib_socket.AF_INET, stdlib_socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: connecting a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
