"""Endpoints and links of the network in memory. What lies between them is `simulation/network`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from labkit.contact import Contact
from labkit.errors import ConnectionLost, LabkitError, NotAdmitted, SecurityMismatch, WrongServerKey
from labkit.wire.frames import Frame
from labkit.wire.security import Admission, Identity
from labkit.wire.transport import Ended, Hear, Heard, Peer

if TYPE_CHECKING:
    from labkit.simulation.network import SimNetwork

RETRY = 1.0  # seconds until a connection is tried again that nobody heard of, twice as many each time, as TCP does

Place = tuple[str, int]  # host and port


def place_of(contact: Contact) -> Place:
    """Where a node is."""
    return contact.host, contact.port


class Way:
    """One direction of a connection. Messages arrive in the order in which they left, as over TCP."""

    __slots__ = ("_unsent", "arrival", "free_at", "source", "target", "under_way")

    def __init__(self, source: Place, target: Place) -> None:
        self.source, self.target = source, target
        self.free_at = -math.inf  # when the last message will have left, at the bandwidth there is
        self.arrival = -math.inf  # of the last one
        self.under_way = 0  # messages
        self._unsent: deque[tuple[float, int]] | None = None  # what may not have left: until when, and its bytes

    def still_unsent(self, now: float) -> Sequence[tuple[float, int]]:
        """What has not left: until when, and its bytes."""
        unsent = self._unsent
        if unsent is None:
            return ()
        while unsent and unsent[0][0] <= now:
            unsent.popleft()
        return unsent

    def leaves(self, now: float, size: int) -> None:
        """A message leaves, by `free_at`."""
        self.still_unsent(now)
        self._unsent = self._unsent or deque()
        self._unsent.append((self.free_at, size))


class Leaving:
    """An `Unsent`: a message that leaves by some time."""

    __slots__ = ("_by",)

    def __init__(self, by: float) -> None:
        self._by = by

    @property
    def done(self) -> bool:
        return trio.current_time() >= self._by


GONE = Leaving(-math.inf)


class SimLink:
    """A `Link` in memory. The far end knows it as a `Peer`."""

    __slots__ = (
        "_ended", "_far", "_heard", "_home", "_network", "_open", "_waiting", "back", "contact", "error", "out", "peer"
    )  # fmt: skip

    def __init__(
        self, network: SimNetwork, home: SimEndpoint, contact: Contact, route: bytes, heard: Heard, ended: Ended
    ) -> None:
        self.contact = contact
        self.error: LabkitError | None = None
        self._network = network
        self._home = home
        self._heard = heard
        self._ended = ended
        self._far: SimEndpoint | None = None
        self._waiting: list[Callable[[], object]] = []  # what to do when it is open
        self._open = False
        here, there = place_of(home.contact), place_of(contact)
        self.out, self.back = Way(here, there), Way(there, here)
        self.peer = Peer(route, home.identity.public_key if contact.secure else None)

    def knock(self) -> None:
        """Begin to connect."""
        network = self._network
        there_and_back = network.handshake * (network.delay(self.out) + network.delay(self.back))
        network.timers.after(there_and_back / 2, self._knock, there_and_back / 2)

    def _knock(self, way_back: float, again: float = RETRY) -> None:
        """The far end hears of the connection; if nobody does, knock again later."""
        if self.error is not None:
            return
        if not self._network.reaches(self.out):
            self._network.timers.after(again, self._knock, way_back, 2 * again)
            return
        far, where = self._network.nodes.get(self.out.target), self.contact.endpoint
        refusal: LabkitError | None = None
        if far is None:
            refusal = ConnectionLost(f"{where} refused the connection")
        elif far.contact.secure != self.contact.secure:
            ours, theirs = ("", "not ") if self.contact.secure else ("not ", "")
            refusal = SecurityMismatch(f"we do {ours}encrypt, {where} does {theirs}")
        elif self.contact.secure and far.contact.key != self.contact.key:
            refusal = WrongServerKey(f"{where} broke off the handshake: it does not hold the key we expect")
        elif not far.admission.admits(self._home.identity.public_key):
            refusal = NotAdmitted(f"{where} is a private swarm and does not admit our key")
        if refusal is not None or far is None:
            self._network.timers.after(way_back, self._network.arrive, self.back, self, self.end, refusal)
            return
        self._far = far
        far.peers[self.peer.route] = self
        self._network.timers.after(way_back, self._network.arrive, self.back, self, self._let_in)

    def _let_in(self) -> None:
        self._open = True
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            action()

    def send_nowait(self, frames: Sequence[Frame]) -> Leaving | None:
        if self.error is not None:
            raise self.error
        if not self._open or self._far is None:
            return None
        self._network.transmit(self.out, frames, self._far.hear, self)
        return GONE if self._network.bandwidth == math.inf else Leaving(self.out.free_at)

    def when_ready(self, action: Callable[[], object]) -> None:
        self._waiting.append(action)

    def answer(self, frames: Sequence[Frame]) -> None:
        """Send in the other direction."""
        self._network.transmit(self.back, frames, self._hear, self)

    def _hear(self, link: SimLink, frames: Sequence[Frame]) -> None:
        if self.error is None:
            self._heard(frames)

    def close(self) -> None:
        if self.error is None:
            if self._far is not None:  # hears of it after all that was sent, if it hears anything
                network, way = self._network, self.out
                network.timers.at(
                    max(network.soon(way), way.arrival), network.arrive, way, self, self._far.forget, self
                )
            self.end(ConnectionLost(f"the link to {self.contact.endpoint} is closed"))

    def end(self, error: LabkitError) -> None:
        """It is over, for whatever reason."""
        if self.error is None:
            self.error = error
            self._waiting.clear()
            self._home.links.pop(self.peer.route, None)
            self._ended(error)

    def break_off(self) -> None:
        """The far end is gone, or takes it for gone: we hear of it after all that it sent, if we hear anything."""
        if self._far is not None:
            self._far.forget(self)
        broken = ConnectionLost(f"the connection to {self.contact.endpoint} broke")
        network, way = self._network, self.back
        network.timers.at(max(network.soon(way), way.arrival), network.arrive, way, self, self.end, broken)


class SimEndpoint:
    """An `Endpoint` in memory. Made by `SimNetwork.listen`."""

    most_links = 1 << 30

    def __init__(self, network: SimNetwork, identity: Identity, contact: Contact, admission: Admission) -> None:
        self.identity = identity
        self.contact = contact
        self.timers = network.timers
        self.admission = admission
        self.links: dict[bytes, SimLink] = {}  # from here
        self.peers: dict[bytes, SimLink] = {}  # to here
        self._network = network
        self._hear: Hear | None = None
        self._early: list[tuple[Peer, Sequence[Frame]]] = []  # what nobody heard yet
        self._ended = False

    def connect(self, contact: Contact, heard: Heard, ended: Ended) -> SimLink:
        if self._ended:
            raise ConnectionLost(f"{contact.endpoint} was not called, as this node is closing")
        route = next(self._network.routes).to_bytes(8, "big")
        link = self.links[route] = SimLink(self._network, self, contact, route, heard, ended)
        link.knock()
        return link

    async def serve(self, hear: Hear) -> None:
        self._hear = hear
        try:
            for peer, frames in self._early:
                hear(peer, frames)
            self._early.clear()
            await trio.sleep_forever()
        finally:
            self._hear = None

    def hear(self, link: SimLink, frames: Sequence[Frame]) -> None:
        """A message has arrived here."""
        if link.peer.route not in self.peers:
            return
        if self._hear is None:
            self._early.append((link.peer, frames))
        else:
            self._hear(link.peer, frames)

    def forget(self, link: SimLink) -> None:
        """A peer is gone."""
        self.peers.pop(link.peer.route, None)

    async def send(self, peer: Peer, frames: Sequence[Frame]) -> None:
        await trio.lowlevel.checkpoint()
        link = self.peers.get(peer.route)
        if link is None:
            raise ConnectionLost("the peer has gone")
        link.answer(frames)

    def send_nowait(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        link = self.peers.get(peer.route)
        if link is not None:
            link.answer(frames)
        return True

    def unsent_bytes(self, peer: Peer) -> int:
        link, now = self.peers.get(peer.route), trio.current_time()
        if link is None:
            return 0
        return sum(size for _, size in link.back.still_unsent(now))

    def unsent_total(self) -> int:
        if self._network.bandwidth == math.inf:
            return 0
        return sum(self.unsent_bytes(link.peer) for link in self.peers.values())

    def end(self) -> None:
        """The node has ended; its process's connections break."""
        self._ended = True
        if self._network.over:
            return
        for link in list(self.peers.values()):
            link.break_off()
        for link in list(self.links.values()):
            link.close()
        self.peers.clear()
