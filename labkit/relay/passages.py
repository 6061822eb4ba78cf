"""Passages: a relay with IPv4 and IPv6 lets nodes of one IP version call those of the other.

A node that has no way to another one asks a relay, by an encrypted call, for a port that leads there (`PassageServer`
answers, `crossing` asks). The bytes of callers pass here as those of hidden nodes do at `server`, within the same
limits and shares, and encryption runs from the caller to the node that is called.

Nobody finds out about third parties that way, or calls whom he likes: a passage leads to a node of a swarm only, which
has proved the key that the asker knows, over an encrypted connection of the relay's own; a no takes the same time,
whatever was at the address; only those get through who come from an address of which somebody has asked.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from labkit.contact import Address, Contact, is_further_address, is_loopback
from labkit.errors import BadRequest, ConnectionLost, Overloaded, RequestRefused
from labkit.reachability import CALL_BACK_TIME, reaches
from labkit.relay.listening import accept_all, connect_to, peer_host, port_of
from labkit.relay.messages import PASSAGE, AskPassage, Passage
from labkit.relay.server import RelayServer
from labkit.relay.splice import close_at_once, splice
from labkit.relay.turns import Share
from labkit.wire.addresses import plain_ip
from labkit.wire.rpc_types import AsyncMethod, Methods, Reply, Request
from labkit.wire.transport import Endpoint

logger = logging.getLogger(__name__)

MAX_TRIED = 32  # nodes that are tried at the same time; beyond, askers are sent away
MAX_TRIED_PER_MEMBER = 16  # of these, for one member of the swarm
MAX_ASKERS = 256  # addresses that may use one passage; beyond, those of the first are forgotten
CONNECT_TIMEOUT = 3.0  # seconds for a connection to the node that is called
UNUSED_TIME = 60.0  # seconds without a connection after which a passage is closed


@dataclass(eq=False, slots=True)
class _Passage:
    """A port that leads to a node. `member`: the key of who has asked for it first."""

    target: Contact
    at: Address  # where it is reached from here
    member: bytes
    listener: trio.SocketListener
    port: int
    share: Share
    used_at: float
    askers: dict[str, None] = field(default_factory=dict)  # addresses, the first that asked first
    connections: int = 0
    callers: Counter[str] = field(default_factory=Counter)  # connections by address


class PassageServer:
    """Opens passages. Its `methods` have to be served, and `run` has to run, and the relay.

    Args:
        relay: The relay, whose limits, ports, and shares these are.
        endpoint: Its node's.
        is_reached: Whether others reach the node without a relay, and so these ports.
    """

    def __init__(self, relay: RelayServer, endpoint: Endpoint, is_reached: Callable[[], bool] = lambda: True) -> None:
        self.methods: Methods = {PASSAGE: AsyncMethod(self.rpc_passage, AskPassage)}
        self._relay = relay
        self._endpoint = endpoint
        self._is_reached = is_reached
        self._passages: dict[tuple[bytes, Address], _Passage] = {}  # by key, and address as seen from here
        self._tried = Counter[bytes]()  # nodes that are tried now, by who has asked
        self._nursery: trio.Nursery | None = None

    @property
    def targets(self) -> list[Contact]:
        """The nodes to which there are passages now."""
        return [passage.target for passage in self._passages.values()]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Let callers through until cancelled. `task_status` is told when it is ready."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    # ------------------------------------------------------------ asking for one

    async def rpc_passage(self, request: Request) -> Reply:
        """Open a passage to a node, or give the one that there is, if it answers from here."""
        target, member, asker = request.body.target, request.peer.key or b"", plain_ip(request.peer.address)
        self._check(target, member, asker)
        try:
            at = await self._endpoint.find_way(target)
        except ConnectionLost as error:  # which says nothing of others than this machine
            raise RequestRefused(f"this relay does not reach it, either: {error}") from None
        there = Contact(target.key, *at)
        if (target.key, at) not in self._passages:
            with self._trying(member):
                answers = await self._answers(there)
            if not answers:
                return Reply(Passage(0))
        passage = self._passages.get((target.key, at)) or self._open(there, at, member)
        passage.askers.pop(asker, None)
        passage.askers[asker] = None
        if len(passage.askers) > MAX_ASKERS:
            del passage.askers[next(iter(passage.askers))]
        passage.used_at = trio.current_time()
        return Reply(Passage(passage.port))

    def _check(self, target: Contact, member: bytes, asker: str) -> None:
        """Refuse what somebody might ask who is after something else."""
        if not member or not asker:
            raise RequestRefused("a relay gives passages only to those who prove a key")
        if not self._is_reached():
            raise RequestRefused("this relay takes no connections itself now")
        if not target.secure or target.key == self._endpoint.contact.key:
            raise BadRequest("a passage leads to another node than the relay, and to one that encrypts")
        for host, _ in target.addresses:
            if not is_further_address(host) or (is_loopback(host) and not is_loopback(asker)):
                raise BadRequest(f"a passage leads to an IP address of a node, and {host} is none")

    @contextmanager
    def _trying(self, member: bytes) -> Iterator[None]:
        if self._tried.total() >= MAX_TRIED or self._tried[member] >= MAX_TRIED_PER_MEMBER:
            raise Overloaded("this relay is just trying as many nodes as it can; ask again later")
        self._tried[member] += 1
        try:
            yield
        finally:
            self._tried[member] -= 1
            if not self._tried[member]:
                del self._tried[member]

    async def _answers(self, there: Contact) -> bool:
        """Whether a node answers there that holds the key. A no always takes the same time."""
        started = trio.current_time()
        with trio.move_on_after(CALL_BACK_TIME):
            if await reaches(self._endpoint, there):
                return True
        await trio.sleep_until(started + CALL_BACK_TIME)
        return False

    def _open(self, target: Contact, at: Address, member: bytes) -> _Passage:
        limits = self._relay.limits
        if self._nursery is None:
            raise RequestRefused("this relay is closing")
        if len(self._passages) >= limits.passages:
            raise Overloaded(f"this relay has {len(self._passages)} passages, as many as it takes")
        if sum(passage.member == member for passage in self._passages.values()) >= limits.passages_per_member:
            raise Overloaded("this relay has as many passages of this member of the swarm as it takes")
        listener = self._relay.open_port()
        passage = _Passage(target, at, member, listener, port_of(listener), self._relay.share(), trio.current_time())
        self._passages[target.key, at] = passage
        self._nursery.start_soon(self._serve, passage)
        logger.info("a passage leads from port %d to %s", passage.port, target.endpoint)
        return passage

    # ------------------------------------------------------------ callers

    async def _serve(self, passage: _Passage) -> None:
        """Let callers through until there have been none for a while."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept_all, passage.listener, partial(self._call, passage), nursery)
                while passage.connections or trio.current_time() < passage.used_at + UNUSED_TIME:
                    now = trio.current_time()
                    await trio.sleep_until((now if passage.connections else passage.used_at) + UNUSED_TIME)
                nursery.cancel_scope.cancel()
        finally:
            del self._passages[passage.target.key, passage.at]
            passage.listener.socket.close()

    async def _call(self, passage: _Passage, stream: trio.SocketStream) -> None:
        """Pass on what a caller and the node say to each other."""
        host = plain_ip(peer_host(stream))
        if host not in passage.askers or not self._has_room(passage, host):
            await close_at_once(stream)
            return
        passage.connections += 1
        passage.callers[host] += 1
        try:
            with self._relay.one_more_connection():
                there = await connect_to(*passage.at, CONNECT_TIMEOUT)
                await splice(
                    stream, there, idle_timeout=self._relay.limits.idle_timeout, held=self._relay.held,
                    turn=passage.share.turn,
                )  # fmt: skip
        except ConnectionLost:
            pass  # the caller learns it when its connection is closed
        finally:
            passage.connections -= 1
            passage.callers[host] -= 1
            passage.used_at = trio.current_time()
            if not passage.callers[host]:
                del passage.callers[host]
            await close_at_once(stream)

    def _has_room(self, passage: _Passage, host: str) -> bool:
        limits = self._relay.limits
        return (
            not self._relay.is_full
            and passage.connections < limits.connections_per_client
            and passage.callers[host] < limits.connections_per_caller
        )
