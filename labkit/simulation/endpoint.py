"""Endpoints and links of the network in memory (`wire/transport` says what they promise).

What lies between them, latency, loss and cut connections, is `simulation/network`; they know it as a `Medium`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio

from labkit.contact import Contact
from labkit.errors import ConnectionLost, LabkitError, NotAdmitted, SecurityMismatch, WrongServerKey
from labkit.wire.frames import Frame
from labkit.wire.security import Admission, Identity
from labkit.wire.timers import Timers
from labkit.wire.transport import FindPassage, OnEnd, OnMessage, OnRequest, Peer

FIRST_CONNECT_RETRY = 1.0  # seconds until a connection attempt that was lost is repeated; doubled each time, as by TCP

Place = tuple[str, int]  # host and port
Deliver = Callable[["SimLink", Sequence[Frame]], None]  # takes a message at the end of a link


def place_of(contact: Contact) -> Place:
    """Returns where a node is."""
    return contact.host, contact.port


class Direction:
    """One direction of a connection. Messages arrive in the order in which they left, as over TCP."""

    __slots__ = ("_unsent", "arrival", "free_at", "source", "target", "under_way")

    def __init__(self, source: Place, target: Place) -> None:
        self.source, self.target = source, target
        self.free_at = -math.inf  # when the last message will have left, at the given bandwidth
        self.arrival = -math.inf  # when the last message arrives
        self.under_way = 0  # how many messages
        self._unsent: deque[tuple[float, int]] | None = None  # messages: when each will have left, and its bytes

    def still_unsent(self, now: float) -> Sequence[tuple[float, int]]:
        """Returns the messages that have not left at `now`: when each will have, and its bytes."""
        unsent = self._unsent
        if unsent is None:
            return ()
        while unsent and unsent[0][0] <= now:
            unsent.popleft()
        return unsent

    def add_unsent(self, now: float, size: int) -> None:
        """Note that the last message, of `size` bytes, will have left at `free_at`."""
        self.still_unsent(now)
        self._unsent = self._unsent or deque()
        self._unsent.append((self.free_at, size))


class SimUnsent:
    """An `Unsent` in memory: a message that will have left at a time that is known."""

    __slots__ = ("_left_at",)

    def __init__(self, left_at: float) -> None:
        self._left_at = left_at

    @property
    def done(self) -> bool:
        return trio.current_time() >= self._left_at


ALREADY_SENT = SimUnsent(-math.inf)


class Medium(Protocol):
    """What lies between the endpoints, as they use it: `network.SimNetwork`."""

    nodes: dict[Place, SimEndpoint]
    timers: Timers
    bandwidth: float  # bytes per second
    handshake: float  # round trips
    over: bool  # whether nodes end without telling each other

    def new_route(self) -> bytes:
        """Returns the route of a new connection."""

    def move(self, endpoint: SimEndpoint, contact: Contact) -> None:
        """Give a node another place."""

    def reaches(self, direction: Direction) -> bool:
        """Whether the two ends are not cut off from each other."""

    def delay(self, direction: Direction) -> float:
        """Draw the seconds that a message of no size takes."""

    def soon(self, direction: Direction) -> float:
        """Draw the time at which a message arrives that leaves now."""

    def transmit(self, direction: Direction, frames: Sequence[Frame], deliver: Deliver, link: SimLink) -> None:
        """Send a message. `deliver` is called with it when it arrives."""

    def arrive(self, direction: Direction, link: SimLink, action: Callable[..., object], *args: Any) -> None:
        """Call `action(*args)` at the end of a direction, now, or when it is no longer cut."""


class SimLink:
    """A `Link` in memory. The far end knows it as `peer`."""

    __slots__ = (
        "_far", "_home", "_network", "_on_end", "_on_message", "_open", "_waiting", "back", "contact", "error", "out",
        "peer",
    )  # fmt: skip

    def __init__(
        self, network: Medium, home: SimEndpoint, contact: Contact, on_message: OnMessage, on_end: OnEnd
    ) -> None:
        self.contact = contact
        self.error: LabkitError | None = None
        self._network = network
        self._home = home
        self._on_message = on_message
        self._on_end = on_end
        self._far: SimEndpoint | None = None
        self._waiting: list[Callable[[], object]] = []  # actions for when it is open
        self._open = False
        here, there = place_of(home.contact), place_of(contact)
        self.out, self.back = Direction(here, there), Direction(there, here)
        self.peer = Peer(network.new_route(), home.identity.public_key if contact.secure else None, here[0])

    def connect(self) -> None:
        """Begin to make the connection."""
        network = self._network
        there_and_back = network.handshake * (network.delay(self.out) + network.delay(self.back))
        network.timers.after(there_and_back / 2, self._ask_for_entry, there_and_back / 2)

    def _ask_for_entry(self, way_back: float, retry_after: float = FIRST_CONNECT_RETRY) -> None:
        """Let the far end accept or refuse the connection, and its answer take `way_back` seconds.

        While the far end is cut off, try again later.
        """
        if self.error is not None:
            return
        if not self._network.reaches(self.out):
            self._network.timers.after(retry_after, self._ask_for_entry, way_back, 2 * retry_after)
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
        self._network.timers.after(way_back, self._network.arrive, self.back, self, self._on_open)

    def _on_open(self) -> None:
        self._open = True
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            action()

    def send_nowait(self, frames: Sequence[Frame]) -> SimUnsent | None:
        if self.error is not None:
            raise self.error
        if not self._open or self._far is None:
            return None
        self._network.transmit(self.out, frames, self._far.on_message, self)
        return ALREADY_SENT if self._network.bandwidth == math.inf else SimUnsent(self.out.free_at)

    def when_ready(self, action: Callable[[], object]) -> None:
        self._waiting.append(action)

    def answer(self, frames: Sequence[Frame]) -> None:
        """Send a message back, from the far end."""
        self._network.transmit(self.back, frames, self._on_answer, self)

    def _on_answer(self, link: SimLink, frames: Sequence[Frame]) -> None:
        if self.error is None:
            self._on_message(frames)

    def close(self) -> None:
        if self.error is None:
            if self._far is not None:  # which learns of it after all that was sent, if that arrives
                network, out = self._network, self.out
                network.timers.at(
                    max(network.soon(out), out.arrival), network.arrive, out, self, self._far.forget, self
                )
            self.end(ConnectionLost(f"the link to {self.contact.endpoint} is closed"))

    def end(self, error: LabkitError) -> None:
        """End the link, for this reason."""
        if self.error is None:
            self.error = error
            self._waiting.clear()
            self._home.links.pop(self.peer.route, None)
            self._on_end(error)

    def break_off(self) -> None:
        """End the connection from the far end. This end learns of it after all that was sent back, if that arrives."""
        if self._far is not None:
            self._far.forget(self)
        broken = ConnectionLost(f"the connection to {self.contact.endpoint} broke")
        network, back = self._network, self.back
        network.timers.at(max(network.soon(back), back.arrival), network.arrive, back, self, self.end, broken)


class SimEndpoint:
    """An `Endpoint` in memory. Made by `SimNetwork.listen`."""

    most_links = 1 << 30

    def __init__(self, network: Medium, identity: Identity, contact: Contact, admission: Admission) -> None:
        self.identity = identity
        self.contact = contact
        self.bound = place_of(contact)
        self.timers = network.timers
        self.direct: dict[bytes, Place] = {}
        self.find_passage: FindPassage | None = None
        self.admission = admission
        self.links: dict[bytes, SimLink] = {}  # from this node, by route
        self.peers: dict[bytes, SimLink] = {}  # to this node, by route
        self._network = network
        self._on_request: OnRequest | None = None
        self._early: list[tuple[Peer, Sequence[Frame]]] = []  # requests that came before `serve`
        self._ended = False

    def connect(self, contact: Contact, on_message: OnMessage, on_end: OnEnd) -> SimLink:
        if self._ended:
            raise ConnectionLost(f"{contact.endpoint} was not called, as this node is closing")
        link = SimLink(self._network, self, contact, on_message, on_end)
        self.links[link.peer.route] = link
        link.connect()
        return link

    async def find_way(self, contact: Contact) -> Place:
        """Returns where a node is: in memory there is a way everywhere."""
        return place_of(contact)

    def move(self, contact: Contact) -> None:
        """Take another place in the network. Connections that lead to the old one go on, until they are cut."""
        self._network.move(self, contact)
        self.contact = contact

    async def serve(self, on_request: OnRequest) -> None:
        self._on_request = on_request
        try:
            for peer, frames in self._early:
                on_request(peer, frames)
            self._early.clear()
            await trio.sleep_forever()
        finally:
            self._on_request = None

    def on_message(self, link: SimLink, frames: Sequence[Frame]) -> None:
        """Take a message that arrived over a link to this node."""
        if link.peer.route not in self.peers:
            return
        if self._on_request is None:
            self._early.append((link.peer, frames))
        else:
            self._on_request(link.peer, frames)

    def forget(self, link: SimLink) -> None:
        """Forget a link to this node that has ended."""
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
        """End the endpoint: all its connections break, as those of a process that ends."""
        self._ended = True
        if self._network.over:
            return
        for link in list(self.peers.values()):
            link.break_off()
        for link in list(self.links.values()):
            link.close()
        self.peers.clear()
