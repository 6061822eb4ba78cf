"""The network in memory: the seam of `wire/transport`, with whatever latency, loss and bandwidth a simulation asks for.

The code above it is the code that runs over ZeroMQ: the same frames, byte for byte, the same deadlines, and connections
that are refused, break or fall silent as they do there. In virtual time (`simulation/virtual_clock`) thousands of nodes
run in one thread, and nothing waits for real. All that is random is drawn from one seed.
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
from labkit.simulation.endpoint import Deliver, Direction, Place, SimEndpoint, SimLink, place_of
from labkit.simulation.latency import Latency, check_seconds, constant, is_number
from labkit.simulation.virtual_clock import make_timers
from labkit.wire.addresses import LOOPBACK, ports_of, split_address
from labkit.wire.frames import Frame, FrameLimits
from labkit.wire.security import Admission, Identity, must_encrypt
from labkit.wire.timers import Timer

SILENCE_TIMEOUT = 6.0  # seconds after which a connection that is cut breaks, as by ZeroMQ's heartbeats
FIRST_PORT = 1024


@dataclass(slots=True)
class _Backlog:
    """What did not get through a direction that is cut: TCP keeps it and sends it again."""

    actions: list[tuple[Callable[..., object], tuple[Any, ...]]] = field(default_factory=list)  # in their order
    timer: Timer | None = None  # at which it arrives after all, once the direction is healed


class SimNetwork:
    """A network of nodes in this trio run. `open_simnet` makes one.

    `partition` and `unplug` cut connections. What would arrive over one meanwhile arrives after `heal`, in its order,
    as TCP sends it again, and so does the news that one end is gone. That takes the latency anew, but no bandwidth. A
    connection that stays cut for `SILENCE_TIMEOUT` breaks on both sides, and what was held back is lost.

    Args:
        seed: Of all that is random.
        latency: Seconds that a message takes one way, or a distribution of them (`simulation/latency`).
        loss: Share of messages, requests and answers alike, that never arrive; 0 to 1.
        bandwidth: Bytes per second in each direction of a connection.
        uplink: Bytes per second that a node sends, over all of its connections.
        handshake: Round trips before the first message of a connection leaves; TCP and ZeroMQ take two.
        tick: Seconds; messages arrive at multiples of it, up to a tick later than they would. Those that arrive at the
            same time are handled together, which makes large simulations quicker. 0 for none.
        limits: Limits of a message.

    Raises:
        ValueError: An argument is out of its range. A latency that is drawn below zero raises it when it is drawn.
    """

    tcp = False

    def __init__(
        self,
        seed: int = 0,
        *,
        latency: float | Latency = 0.0,
        loss: float = 0.0,
        bandwidth: float = math.inf,
        uplink: float = math.inf,
        handshake: float = 0.0,
        tick: float = 0.0,
        limits: FrameLimits | None = None,
    ) -> None:
        if not (is_number(loss) and 0 <= loss <= 1):
            raise ValueError(f"loss={loss!r}: a share between 0 and 1")
        if not (is_number(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth={bandwidth!r}: bytes per second, more than 0")
        if not (is_number(uplink) and uplink > 0):
            raise ValueError(f"uplink={uplink!r}: bytes per second, more than 0")
        if not (is_number(handshake) and math.isfinite(handshake) and handshake >= 0):
            raise ValueError(f"handshake={handshake!r}: a number of round trips, at least 0")
        check_seconds("tick", tick)
        self.latency = latency if callable(latency) else constant(latency)
        self.loss = loss
        self.bandwidth = min(bandwidth, uplink)
        self.uplink = uplink
        self.handshake = handshake
        self.tick = tick
        self.limits = limits or FrameLimits()
        self.nodes: dict[Place, SimEndpoint] = {}
        self._routes = itertools.count(1)
        self.messages = 0  # messages sent so far, lost ones too
        self.over = False  # set at the end of a simulation: nodes then end without telling each other
        self._random = random.Random(seed)
        self._hosts, self._ports = itertools.count(int(IPv4Address("127.0.0.1"))), itertools.count(FIRST_PORT)
        self._behind: dict[Place, float] = {}  # seconds by which nodes are slowed down
        self._uplinks: dict[Place, float] = {}  # when nodes will have sent all that they send
        self._known: set[Place] = set()  # where nodes are or were
        self._group: dict[Place, object] = {}  # nodes that are not in it are one more group
        self._silent: dict[SimLink, Timer] = {}  # links that are cut, and the timer that breaks them
        self._held: dict[Direction, _Backlog] = {}  # what did not get through, by direction
        self.timers = make_timers()
        self.direct: dict[bytes, Place] = {}

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
        toward: Sequence[Contact] = (),
    ) -> AsyncIterator[SimEndpoint]:
        """Listen at an address for the length of the block. The arguments are those of `ZmqNetwork.listen`.

        A host may be any name, such as that of a region; by default each node gets a loopback address of its own.
        Nothing is encrypted: a secure connection only proves the keys of both ends, as one over CURVE does.
        """
        host, port = split_address(address)
        admission = admission or Admission()
        secure = must_encrypt(secure, host, admission)
        if address == LOOPBACK:
            host = str(IPv4Address(next(self._hosts)))
        if (allowed := ports_of(port)) is None:
            place = host, FIRST_PORT if address == LOOPBACK else next(self._ports)
        else:
            place = host, next((p for p in allowed if (host, p) not in self.nodes), allowed[0])
        if place in self.nodes:
            raise LabkitError(f"cannot listen on {address}: Address already in use")
        self._known.add(place)
        contact = Contact(identity.public_key, *place, secure)
        endpoint = self.nodes[place] = SimEndpoint(self, identity, contact, admission)
        try:
            await trio.lowlevel.checkpoint()
            yield endpoint
        finally:
            del self.nodes[place_of(endpoint.contact)]
            endpoint.end()

    def move(self, endpoint: SimEndpoint, contact: Contact) -> None:
        """Give a node another place: at the old one, new connections are refused."""
        place = place_of(contact)
        if self.nodes.get(place, endpoint) is not endpoint:
            raise LabkitError(f"cannot move to {contact.endpoint}: Address already in use")
        del self.nodes[place_of(endpoint.contact)]
        self.nodes[place] = endpoint
        self._known.add(place)

    # ------------------------------------------------------------ cutting connections

    def partition(self, *groups: Iterable[Contact]) -> None:
        """Cut the connections between nodes of different groups; nodes of no group are one more group.

        A connection that is cut breaks after `SILENCE_TIMEOUT`, on both sides. Raises `ValueError` for a contact in two
        groups, or one at which there never was a node.
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
        """Cut these nodes off from all others, like machines that lose their power: no other node is told.

        Raises `ValueError` for a contact at which there never was a node.
        """
        group = {self._place_known(contact): contact for contact in contacts}
        self._group |= group
        self._regroup(group)

    def heal(self, *contacts: Contact) -> None:
        """Undo `unplug` for these nodes. Without any, undo all of `unplug` and `partition`."""
        places = [place_of(contact) for contact in contacts]
        if places:
            for place in places:
                self._group.pop(place, None)
        else:
            self._group.clear()
        self._regroup(places)

    def slow_down(self, contact: Contact, seconds: float) -> None:
        """Delay all that a node sends or receives by `seconds`. Raises `ValueError`."""
        check_seconds("seconds", seconds)
        self._behind[place_of(contact)] = seconds

    def _place_known(self, contact: Contact) -> Place:
        place = place_of(contact)
        if place not in self._known:
            raise ValueError(f"{contact.endpoint}: no node of this network is or was there")
        return place

    def _regroup(self, places: Iterable[Place]) -> None:
        """Begin to break the links of these nodes that are cut now, and resume all links that are not cut any more."""
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
        """Break this link after `SILENCE_TIMEOUT`, unless it is resumed before."""
        if link not in self._silent:
            self._silent[link] = self.timers.at(trio.current_time() + SILENCE_TIMEOUT, self._break, link)

    def _break(self, link: SimLink) -> None:
        del self._silent[link]
        self._held.pop(link.out, None)
        self._held.pop(link.back, None)
        far = self.nodes.get(link.out.target)
        if far is not None:
            far.forget(link)
        link.end(ConnectionLost(f"the connection to {link.contact.endpoint} broke"))

    def _hold(self, direction: Direction, link: SimLink, action: Callable[..., object], *args: Any) -> None:
        """Keep what does not get through until its direction is healed."""
        if direction not in self._held:
            self._held[direction] = _Backlog()
        self._held[direction].actions.append((action, args))
        if not self.reaches(direction):
            self._fall_silent(link)

    def _send_again(self, direction: Direction) -> None:
        """Let what was held back arrive after the latency."""
        backlog = self._held.get(direction)
        if backlog is not None:
            if backlog.timer is not None:
                self.timers.cancel(backlog.timer)
            direction.arrival = max(direction.arrival, self.soon(direction))
            backlog.timer = self.timers.at(direction.arrival, self._release, direction)

    def _release(self, direction: Direction) -> None:
        """Let what was held back arrive now. What is cut off again is held again."""
        backlog = self._held.pop(direction, None)
        for action, args in backlog.actions if backlog is not None else ():
            action(*args)

    # ------------------------------------------------------------ messages

    def new_route(self) -> bytes:
        """Returns the route of a new connection."""
        return next(self._routes).to_bytes(8, "big")

    def reaches(self, direction: Direction) -> bool:
        """Whether the two ends of a direction are not cut off from each other."""
        return not self._group or self._group.get(direction.source) == self._group.get(direction.target)

    def delay(self, direction: Direction) -> float:
        """Draw the seconds that a message of no size takes."""
        seconds = self.latency(self._random, direction.source[0], direction.target[0])
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
        return seconds + self._behind.get(direction.source, 0.0) + self._behind.get(direction.target, 0.0)

    def soon(self, direction: Direction) -> float:
        """Draw the time at which a message arrives that leaves now."""
        return trio.current_time() + self.delay(direction)

    def transmit(self, direction: Direction, frames: Sequence[Frame], deliver: Deliver, link: SimLink) -> None:
        """Send a message. `deliver` is called with it when it arrives."""
        self.messages += 1
        size, now = sum(map(len, frames)), trio.current_time()
        if self.uplink < math.inf:
            begins = max(now, self._uplinks.get(direction.source, now))
            self._uplinks[direction.source] = begins + size / self.uplink
            direction.free_at = max(begins, direction.free_at) + size / self.bandwidth
        else:
            direction.free_at = max(now, direction.free_at) + size / self.bandwidth
        arrival = direction.free_at + self.delay(direction)
        if self.tick:
            arrival = math.ceil(arrival / self.tick) * self.tick
        direction.arrival = max(direction.arrival, arrival)
        if direction.free_at > now:
            direction.add_unsent(now, size)
        if self.loss and self._random.random() < self.loss:
            return
        direction.under_way += 1
        arguments = direction, [frame if type(frame) is bytes else bytes(frame) for frame in frames], deliver, link
        if direction.arrival <= now and direction.under_way == 1:
            self._deliver(*arguments)
        else:
            self.timers.at(direction.arrival, self._deliver, *arguments)

    def _deliver(self, direction: Direction, frames: Sequence[bytes], deliver: Deliver, link: SimLink) -> None:
        if (self._group or self._held) and self._is_blocked(direction):
            self._hold(direction, link, self._deliver, direction, frames, deliver, link)
            return
        direction.under_way -= 1
        if any(len(frame) > self.limits.message_bytes for frame in frames):
            link.break_off()
        else:
            deliver(link, frames)

    def arrive(self, direction: Direction, link: SimLink, action: Callable[..., object], *args: Any) -> None:
        """Call `action(*args)` at the end of a direction: now, or when it is healed.

        For what is no message: that one end has accepted the other, or is gone.
        """
        if self._is_blocked(direction):
            self._hold(direction, link, self.arrive, direction, link, action, *args)
        else:
            action(*args)

    def _is_blocked(self, direction: Direction) -> bool:
        """Whether a direction is cut, or something is held back that has to arrive first."""
        return direction in self._held or not self.reaches(direction)


@asynccontextmanager
async def open_simnet(seed: int = 0, **options: Any) -> AsyncIterator[SimNetwork]:
    """Open a network for the nodes of this trio run, for the length of the block.

    The seed also decides the order in which trio runs tasks that are ready at the same time, so that a simulation can
    be repeated exactly. For this trio has one random generator in a process; it is seeded here and restored at the end.
    Another trio run in a second thread would draw from it, too: a simulation that must be repeatable runs alone in its
    process.

    Args:
        seed: Of all that is random.
        options: The other arguments of `SimNetwork`.
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
    """Let a seed decide the order of tasks. trio has no public way for this; its own tests use this one."""
    allowed, state = _run._ALLOW_DETERMINISTIC_SCHEDULING, _run._r.getstate()
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    _run._r.seed(seed)
    try:
        yield
    finally:
        _run._ALLOW_DETERMINISTIC_SCHEDULING = allowed  # type: ignore[misc]
        _run._r.setstate(state)
