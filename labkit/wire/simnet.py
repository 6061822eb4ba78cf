"""The network in memory: the seam of `wire/endpoint`, with the latency, loss and bandwidth that one asks for.

The code above it is the code that runs over ZeroMQ: the same frames, byte for byte, the same deadlines, and connections
that are refused, break or fall silent as they do there. Under trio's `MockClock(autojump_threshold=0)` thousands of
nodes run in one thread, and nothing waits for real. Whatever is random is drawn from one seed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from typing import Any

import trio
from trio._core import _run

from labkit.contact import Contact
from labkit.errors import ConnectionLost, LabkitError
from labkit.wire.addresses import LOOPBACK, split_address
from labkit.wire.agenda import Agenda
from labkit.wire.frames import Frame, FrameLimits
from labkit.wire.latency import Latency, check_seconds, constant
from labkit.wire.security import Admission, Identity, must_encrypt
from labkit.wire.simlink import Place, SimEndpoint, SimLink, Way, place_of

SILENCE = 6.0  # seconds after which a connection over which nothing comes is given up, as by ZeroMQ's heartbeats
FIRST_PORT = 1024


class SimNetwork:
    """A network of nodes in this trio run. `open_simnet` makes one.

    `latency`: seconds that a message takes one way, or a distribution of them (`wire/latency`). `loss`: share of
    messages, requests and answers alike, that never arrive. `bandwidth`: bytes per second of each direction of a
    connection. `handshake`: round trips before the first message of a connection leaves; TCP and ZeroMQ take two.
    Raises `ValueError` for what cannot be.
    """

    tcp = False

    def __init__(
        self,
        seed: int = 0,
        *,
        latency: float | Latency = 0.0,
        loss: float = 0.0,
        bandwidth: float = math.inf,
        handshake: float = 0.0,
        limits: FrameLimits | None = None,
    ) -> None:
        if not 0 <= loss <= 1:
            raise ValueError(f"loss={loss!r}: a share between 0 and 1")
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth!r}: bytes per second, more than 0")
        if not (math.isfinite(handshake) and handshake >= 0):
            raise ValueError(f"handshake={handshake!r}: a number of round trips, at least 0")
        self.latency = latency if callable(latency) else constant(latency)
        self.loss = loss
        self.bandwidth = bandwidth
        self.handshake = handshake
        self.limits = limits or FrameLimits()
        self.nodes: dict[Place, SimEndpoint] = {}
        self.routes = itertools.count(1)
        self.messages = 0  # sent so far, the lost ones too
        self.over = False  # then nobody hears any more that others end
        self._random = random.Random(seed)
        self._hosts, self._ports = itertools.count(int(IPv4Address("127.0.0.1"))), itertools.count(FIRST_PORT)
        self._behind: dict[Place, float] = {}
        self._group: dict[Place, object] = {}  # who is not here belongs to the rest
        self.agenda = Agenda()

    # ------------------------------------------------------------ nodes

    @asynccontextmanager
    async def listen(
        self,
        identity: Identity,
        address: str = LOOPBACK,
        *,
        announce: str | None = None,
        secure: bool | None = None,
        admission: Admission | None = None,
    ) -> AsyncIterator[SimEndpoint]:
        """As `ZmqNetwork.listen`; a host may be any name, such as that of a region. By default each node has a loopback
        address of its own. Nothing is encrypted; a secure connection only knows whose it is, as one over CURVE does."""
        host, port = split_address(address)
        admission = admission or Admission()
        secure = must_encrypt(secure, host, admission)
        if address == LOOPBACK:
            host = str(IPv4Address(next(self._hosts)))
        place = host, (FIRST_PORT if address == LOOPBACK else next(self._ports)) if port == "*" else int(port)
        if place in self.nodes:
            raise LabkitError(f"cannot listen on {address}: Address already in use")
        contact = Contact(identity.public_key, *place, secure)
        endpoint = self.nodes[place] = SimEndpoint(self, identity, contact, admission)
        try:
            await trio.lowlevel.checkpoint()
            yield endpoint
        finally:
            del self.nodes[place]
            endpoint.end()

    # ------------------------------------------------------------ what befalls them

    def partition(self, *groups: Iterable[Contact]) -> None:
        """From now on nodes of different groups hear nothing of each other; those in none are one more group.

        A connection between them is taken for broken after `SILENCE`, on both sides.
        """
        self._group = {place_of(contact): number for number, group in enumerate(groups) for contact in group}
        self._break_silent_ones()

    def unplug(self, *contacts: Contact) -> None:
        """Cut these off, each from everybody, as a machine that loses its power: nobody is told."""
        self._group |= {place_of(contact): contact for contact in contacts}
        self._break_silent_ones()

    def heal(self, *contacts: Contact) -> None:
        """Plug these in again; without any, all, and partitions are over."""
        if contacts:
            for contact in contacts:
                self._group.pop(place_of(contact), None)
        else:
            self._group.clear()

    def slow_down(self, contact: Contact, seconds: float) -> None:
        """A node that runs behind: whatever it sends or hears comes that much later. Raises `ValueError`."""
        check_seconds("seconds", seconds)
        self._behind[place_of(contact)] = seconds

    def _break_silent_ones(self) -> None:
        for node in list(self.nodes.values()):
            for link in list(node.links.values()):
                if not self.reaches(link.out):
                    self.agenda.after(SILENCE, self._give_up, link)

    def _give_up(self, link: SimLink) -> None:
        if not self.reaches(link.out):
            far = self.nodes.get(link.out.target)
            if far is not None:
                far.forget(link)
            link.end(ConnectionLost(f"the connection to {link.contact.endpoint} broke"))

    # ------------------------------------------------------------ messages

    def reaches(self, way: Way) -> bool:
        """Whether what one of its ends sends now is heard at the other."""
        return not self._group or self._group.get(way.source) == self._group.get(way.target)

    def delay(self, way: Way) -> float:
        """Seconds that a message of no size takes: drawn anew each time."""
        seconds = self.latency(self._random, way.source[0], way.target[0])
        if not self._behind:
            return seconds
        return seconds + self._behind.get(way.source, 0.0) + self._behind.get(way.target, 0.0)

    def soon(self, way: Way) -> float:
        """When a message arrives that leaves now."""
        return trio.current_time() + self.delay(way)

    def transmit(
        self, way: Way, frames: Sequence[Frame], hear: Callable[[SimLink, Sequence[Frame]], None], link: SimLink
    ) -> None:
        """Send a message, which `hear` gets when it arrives."""
        self.messages += 1
        size, now = sum(map(len, frames)), trio.current_time()
        way.free_at = max(now, way.free_at) + size / self.bandwidth
        way.arrival = max(way.arrival, way.free_at + self.delay(way))
        if way.free_at > now:
            way.leaves(now, size)
        # Drawn also if it is cut off, so that one does not shift the other.
        lost = self.loss and self._random.random() < self.loss
        if lost or not self.reaches(way):
            return
        way.under_way += 1
        arguments = way, [bytes(frame) for frame in frames], hear, link
        if way.arrival <= now and way.under_way == 1:
            self._deliver(*arguments)
        else:
            self.agenda.at(way.arrival, self._deliver, *arguments)

    def _deliver(
        self, way: Way, frames: Sequence[bytes], hear: Callable[[SimLink, Sequence[Frame]], None], link: SimLink
    ) -> None:
        way.under_way -= 1
        if not self.reaches(way):
            return
        if any(len(frame) > self.limits.message_bytes for frame in frames):
            link.break_off()
        else:
            hear(link, frames)


@asynccontextmanager
async def open_simnet(seed: int = 0, **options: Any) -> AsyncIterator[SimNetwork]:
    """A network for the nodes of this trio run. The arguments are those of `SimNetwork`.

    The seed also decides the order in which trio runs tasks that are ready at the same time: the same run, twice.
    """
    network = SimNetwork(seed, **options)
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]  # trio has no public way; its tests use this
    _run._r.seed(seed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.agenda.run)
        try:
            yield network
        finally:
            nursery.cancel_scope.cancel()
