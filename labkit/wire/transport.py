"""The seam between remote calls and the network: a node's endpoint, links from it to other nodes, and their addresses.

`Endpoint` and `Link` move frames and know nothing of calls. `wire/zmq_transport` is the real network, and
`simulation/network` one in memory. Both call back; `await_callback` is the way from code that has a task to them.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

from labkit.contact import Contact
from labkit.errors import ConnectionLost, LabkitError
from labkit.wire.frames import Frame
from labkit.wire.security import Admission, Identity
from labkit.wire.timers import Timers


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a request: the connection it came on and, over CURVE, the public key that the handshake proved."""

    route: bytes
    key: bytes | None = None


Heard = Callable[[Sequence[Frame]], object]
Ended = Callable[[LabkitError], object]
Hear = Callable[[Peer, Sequence[Frame]], object]


class Unsent(Protocol):
    """A message that was sent. `done`: whether it has left this process."""

    @property
    def done(self) -> bool: ...


class Link(Protocol):
    """A connection to one node. It is made in the background and never made again: when it breaks it is over."""

    error: LabkitError | None  # why the link is over, None while it is not

    def send_nowait(self, frames: Sequence[Frame]) -> Unsent | None:
        """Send if that is possible at once; None if not. Raises `ConnectionLost` (or a kind of it)."""

    def when_ready(self, action: Callable[[], object]) -> None:
        """After a `send_nowait` for which it was too early: call `action`, once, when the connection is there and has
        room. When the link is over instead, `ended` is called, and this is not."""

    def close(self) -> None:
        """End the connection."""


class Endpoint(Protocol):
    """One node's place on the network."""

    contact: Contact
    timers: Timers  # the network's
    most_links: int  # that the system lets it have

    def connect(self, contact: Contact, heard: Heard, ended: Ended) -> Link:
        """A new link to a node; returns at once. `heard` is called with each message that arrives and, after the last
        one, `ended` with the reason why the link is over. Raises `ConnectionLost` if this node is closing."""

    async def serve(self, hear: Hear) -> None:
        """Call `hear` with each request that arrives, and who sent it, until cancelled."""

    async def send(self, peer: Peer, frames: Sequence[Frame]) -> None:
        """Answer a peer, waiting for room. Raises `ConnectionLost` if it is gone."""

    def send_nowait(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        """Answer a peer if that is possible at once. False if there is no room now; a peer that is gone needs none."""

    def unsent_bytes(self, peer: Peer) -> int:
        """Size of the answers that this peer has not taken yet."""

    def unsent_total(self) -> int:
        """The same of all peers together."""


class Network(Protocol):
    """Where nodes listen. `tcp`: whether any program can connect to their addresses. `timers`: for what comes later."""

    tcp: bool
    timers: Timers

    def listen(
        self, identity: Identity, address: str = ..., *, announce: str | None = None, secure: bool | None = None,
        admission: Admission | None = None,
    ) -> AbstractAsyncContextManager[Endpoint]:  # fmt: skip
        """Give a node its place for the length of the block. See `ZmqNetwork.listen`."""


LOOPBACK = "tcp://127.0.0.1:*"


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
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectionLost(f"the name {host} does not resolve ({error})") from None
    return str(found[0][4][0])


def announced_address(announce: str | None, host: str, port: int) -> tuple[str, int]:
    """The host and port to put into the contact of a node that is bound to `host` and `port`."""
    if announce is None:
        return (_own_address() if ipaddress.ip_address(host).is_unspecified else host), port
    name, colon, announced_port = announce.rpartition(":")
    if not colon or announce.endswith("]") or (":" in name and "[" not in name):  # no port, or an IPv6 address
        return announce.strip("[]"), port
    if not announced_port.isdigit():
        raise ValueError(f"announce={announce!r} is not an address; write HOST or HOST:PORT")
    return name.strip("[]"), int(announced_port)


def _own_address() -> str:
    """This machine's address on the interface of its default route; loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: connecting a datagram socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


T = TypeVar("T")


class Cancellable(Protocol):
    """Something that calls back when it is done."""

    def cancel(self) -> None:
        """Nobody waits for it any more: it calls nobody back. Does nothing when it is done."""


async def await_callback(begin: Callable[[Callable[[T | Exception], None]], Cancellable]) -> T:
    """Begin something and wait until it calls back. Returns what it says, or raises it, if that is an error.

    `begin` is given what to call with the outcome: once, in this thread, perhaps before it returns.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task, waits = trio.lowlevel.current_task(), False
    outcome: list[T | Exception] = []

    def done(what: T | Exception) -> None:
        outcome.append(what)
        if waits:
            trio.lowlevel.reschedule(task)

    under_way = begin(done)
    if outcome:
        await trio.lowlevel.cancel_shielded_checkpoint()
    else:
        waits = True

        def abort(_: object) -> trio.lowlevel.Abort:
            under_way.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
    what = outcome.pop()  # or the frame of an error would hold the error
    if isinstance(what, Exception):
        raise what
    return what
