"""The network in memory: the seam of `wire/transport`, with the latency, loss and bandwidth that one asks for.

The code above it is the code that runs over ZeroMQ: the same frames, byte for byte, the same deadlines, and connections
that are refused, break or fall silent as they do there. Under trio's `MockClock(autojump_threshold=0)` thousands of
nodes run in one thread, and nothing waits for real. Whatever is random is drawn from one seed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

import trio
from trio._core import _run

from labkit.contact import Contact
from labkit.errors import ConnectionLost, LabkitError
from labkit.simulation.endpoint import Place, SimEndpoint, SimLink, Way, place_of
from labkit.simulation.latency import Latency, check_seconds, constant, is_number
from labkit.wire.frames import Frame, FrameLimits
from labkit.wire.security import Admission, Identity, must_encrypt
from labkit.wire.timers import Timer, Timers
from labkit.wire.transport import LOOPBACK, split_address

SILENCE = 6.0  # seconds after which a connection over which nothing comes is given up, as by ZeroMQ's heartbeats
FIRST_PORT = 1024


@dataclass(slots=True)
class Held:
    """What did not get through a way that is cut: TCP keeps it and sends it again."""

    actions: list[tuple[Callable[..., object], tuple[Any, ...]]] = field(default_factory=list)  # as they left
    again: Timer | None = None  # when it arrives after all, once the way is mended


class SimNetwork:
    """A network of nodes in this trio run. `open_simnet` makes one.

    `latency`: seconds that a message takes one way, or a distribution of them (`simulation/latency`). `loss`: share of
    messages, requests and answers alike, that never arrive. `bandwidth`: bytes per second of each direction of a
    connection. `handshake`: round trips before the first message of a connection leaves; TCP and ZeroMQ take two.
    Raises `ValueError` for what cannot be; a latency that is drawn below zero raises it when it is drawn.

    `partition` and `unplug` cut connections. What would arrive over one meanwhile comes after `heal`, in its order, as
    TCP sends it again, the word that one end is gone among it; that takes the latency anew, and no bandwidth. A
    connection that stays cut for `SILENCE` breaks on both sides, and what was held of it is lost. What `loss` takes
    never arrives.
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
        if not (is_number(loss) and 0 <= loss <= 1):
            raise ValueError(f"loss={loss!r}: a share between 0 and 1")
        if not (is_number(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth={bandwidth!r}: bytes per second, more than 0")
        if not (is_number(handshake) and math.isfinite(handshake) and handshake >= 0):
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
        self._known: set[Place] = set()  # where nodes are or were
        self._group: dict[Place, object] = {}  # who is not here belongs to the rest
        self._silent: dict[SimLink, Timer] = {}  # that are cut, and when they are given up
        self._held: dict[Way, Held] = {}
        self.timers = Timers()

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
        self._known.add(place)
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

        A connection between them is taken for broken after `SILENCE`, on both sides. Raises `ValueError` for a contact
        in two groups, or one at which no node ever was.
        """
        group: dict[Place, object] = {}
        for number, contacts in enumerate(groups):
            for contact in contacts:
                place = self._place_known(contact)
                if group.setdefault(place, number) != number:
                    raise ValueError(f"{contact.endpoint} is in two groups: a partition puts each node in one")
        self._group = group
        self._regroup(self.nodes)

    def unplug(self, *contacts: Contact) -> None:
        """Cut these off, each from everybody, as a machine that loses its power: nobody is told. Raises `ValueError`
        for a contact at which no node ever was."""
        group = {self._place_known(contact): contact for contact in contacts}
        self._group |= group
        self._regroup(group)

    def heal(self, *contacts: Contact) -> None:
        """Plug these in again; without any, all, and partitions are over."""
        places = [place_of(contact) for contact in contacts]
        if places:
            for place in places:
                self._group.pop(place, None)
        else:
            self._group.clear()
        self._regroup(places)

    def slow_down(self, contact: Contact, seconds: float) -> None:
        """A node that runs behind: whatever it sends or hears comes that much later. Raises `ValueError`."""
        check_seconds("seconds", seconds)
        self._behind[place_of(contact)] = seconds

    def _place_known(self, contact: Contact) -> Place:
        place = place_of(contact)
        if place not in self._known:
            raise ValueError(f"{contact.endpoint}: no node of this network is or was there")
        return place

    def _regroup(self, places: Iterable[Place]) -> None:
        """The nodes at these places may be cut off from others now, and whoever was cut off may hear again."""
        for place in places:
            node = self.nodes.get(place)
            if node is not None:
                for link in (*node.links.values(), *node.peers.values()):
                    if not self.reaches(link.out):
                        self._fall_silent(link)
        for link in [link for link in self._silent if self.reaches(link.out)]:
            self.timers.cancel(self._silent.pop(link))
            self._send_again(link.out)
            self._send_again(link.back)

    def _fall_silent(self, link: SimLink) -> None:
        if link not in self._silent:
            self._silent[link] = self.timers.at(trio.current_time() + SILENCE, self._give_up, link)

    def _give_up(self, link: SimLink) -> None:
        del self._silent[link]
        self._held.pop(link.out, None)
        self._held.pop(link.back, None)
        far = self.nodes.get(link.out.target)
        if far is not None:
            far.forget(link)
        link.end(ConnectionLost(f"the connection to {link.contact.endpoint} broke"))

    def _hold(self, way: Way, link: SimLink, action: Callable[..., object], *args: Any) -> None:
        """Something does not get through; try it again when the way is mended."""
        if way not in self._held:
            self._held[way] = Held()
        self._held[way].actions.append((action, args))
        if not self.reaches(way):
            self._fall_silent(link)

    def _send_again(self, way: Way) -> None:
        held = self._held.get(way)
        if held is not None:
            if held.again is not None:
                self.timers.cancel(held.again)
            way.arrival = max(way.arrival, self.soon(way))
            held.again = self.timers.at(way.arrival, self._let_go, way)

    def _let_go(self, way: Way) -> None:
        """What was held arrives, unless the way is cut again."""
        held = self._held.pop(way, None)
        for action, args in held.actions if held is not None else ():
            action(*args)

    # ------------------------------------------------------------ messages

    def reaches(self, way: Way) -> bool:
        """Whether what comes to one of its ends now gets there from the other."""
        return not self._group or self._group.get(way.source) == self._group.get(way.target)

    def delay(self, way: Way) -> float:
        """Seconds that a message of no size takes: drawn anew each time."""
        seconds = self.latency(self._random, way.source[0], way.target[0])
        try:
            possible = 0.0 <= seconds < math.inf
        except TypeError:
            possible = False
        if not possible:
            raise ValueError(
                f"latency={seconds!r}, drawn from {self.latency!r}: a finite number of seconds, at least 0"
            )
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
        if self.loss and self._random.random() < self.loss:
            return
        way.under_way += 1
        arguments = way, [bytes(frame) for frame in frames], hear, link
        if way.arrival <= now and way.under_way == 1:
            self._deliver(*arguments)
        else:
            self.timers.at(way.arrival, self._deliver, *arguments)

    def _deliver(
        self, way: Way, frames: Sequence[bytes], hear: Callable[[SimLink, Sequence[Frame]], None], link: SimLink
    ) -> None:
        if (self._group or self._held) and self._is_blocked(way):
            self._hold(way, link, self._deliver, way, frames, hear, link)
            return
        way.under_way -= 1
        if any(len(frame) > self.limits.message_bytes for frame in frames):
            link.break_off()
        else:
            hear(link, frames)

    def arrive(self, way: Way, link: SimLink, action: Callable[..., object], *args: Any) -> None:
        """Something other than a message arrives: one end has let the other in, or is gone."""
        if self._is_blocked(way):
            self._hold(way, link, self.arrive, way, link, action, *args)
        else:
            action(*args)

    def _is_blocked(self, way: Way) -> bool:
        """Whether it is cut, or something is held on it that comes first."""
        return way in self._held or not self.reaches(way)


@asynccontextmanager
async def open_simnet(seed: int = 0, **options: Any) -> AsyncIterator[SimNetwork]:
    """A network for the nodes of this trio run. The arguments are those of `SimNetwork`.

    The seed also decides the order in which trio runs tasks that are ready at the same time: the same run, twice. For
    this trio has one generator in a process, which is seeded here and put back at the end. Another trio run that is
    busy in a second thread draws from it, too: a simulation that must be repeatable runs alone in its process.
    """
    network = SimNetwork(seed, **options)
    with _order_of_tasks(seed):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.timers.run)
            try:
                yield network
            finally:
                nursery.cancel_scope.cancel()


@contextmanager
def _order_of_tasks(seed: int) -> Iterator[None]:
    """Meanwhile a seed decides it. trio has no public way; its tests use this one."""
    allowed, state = _run._ALLOW_DETERMINISTIC_SCHEDULING, _run._r.getstate()
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    _run._r.seed(seed)
    try:
        yield
    finally:
        _run._ALLOW_DETERMINISTIC_SCHEDULING = allowed  # type: ignore[misc]
        _run._r.setstate(state)
