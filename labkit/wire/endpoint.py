"""The seam between remote calls and the network: a node's endpoint, and links from it to other nodes.

`Endpoint` and `Link` move frames and know nothing of calls. `wire/zeromq.py` is the real network, and `wire/simnet.py`
one in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from labkit.contact import Contact
from labkit.errors import LabkitError
from labkit.wire.agenda import Agenda
from labkit.wire.frames import Frame
from labkit.wire.security import Admission, Identity


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
    agenda: Agenda  # the network's
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
    """Where nodes listen. `tcp`: whether any program can connect to their addresses. `agenda`: for what comes later."""

    tcp: bool
    agenda: Agenda

    def listen(
        self, identity: Identity, address: str = ..., *, announce: str | None = None, secure: bool | None = None,
        admission: Admission | None = None,
    ) -> AbstractAsyncContextManager[Endpoint]:  # fmt: skip
        """Give a node its place for the length of the block. See `ZmqNetwork.listen`."""
