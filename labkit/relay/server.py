"""The relay: gives hidden nodes ports, and passes on what callers send there, and what the hidden nodes answer.

It is a part of a node that can be reached. Who may call that node may reserve a port, so that in a private swarm only
its members are relayed for; a hidden node proves who it is by the encrypted call. `RelayLimits` bounds all of it.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from labkit.contact import Contact
from labkit.errors import BadRequest, LabkitError, Overloaded, RequestRefused
from labkit.relay import messages
from labkit.relay.limits import RelayLimits
from labkit.relay.listening import accept_all, listen_at, peer_host, port_of
from labkit.relay.messages import (
    HELLO_TIMEOUT,
    PING_PERIOD,
    SILENCE,
    AskNeighbours,
    Attach,
    Attached,
    BadRelayMessage,
    Bring,
    Fetch,
    MessageReader,
    Neighbours,
    Reserve,
    Reserved,
    StillHere,
)
from labkit.relay.splice import Held, close_at_once, splice
from labkit.relay.turns import FairTurns, Share
from labkit.wire.rpc_types import Methods, Reply, Request, SyncMethod
from labkit.wire.zmq_transport import open_files

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT = 10.0  # seconds that a reservation waits for its client to attach
FETCH_TIMEOUT = 5.0  # seconds that a caller waits to be fetched
MAX_GREETING = 256  # connections that have not said yet whose they are
MAX_GREETING_PER_HOST = 64  # of these, from one address
FILES_PER_CONNECTION = 4  # of those that the system lets us open: it takes two, and the node needs some for itself
MAX_KNOWN_PORTS = 1024  # clients whose last port is remembered, so that they keep their address


@dataclass(frozen=True, slots=True)
class RelayedClient:
    """One node that is relayed for, as `RelayServer.clients` lists it."""

    key: bytes
    port: int
    connections: int


@dataclass(eq=False, slots=True)
class _Caller:
    """A caller who waits. `fetched`: the connection that the client opened for it, and the first bytes on it."""

    fetched: tuple[trio.SocketStream, bytes] | None = None
    news: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _Client:
    """A node that is relayed for. `member`: the key of who has asked for it, mostly the same."""

    member: bytes
    key: bytes
    id: bytes
    secret: bytes
    port: int
    listener: trio.SocketListener
    share: Share
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # of all that is done for it
    direct: Contact | None = None  # how it is reached in its own network
    control: trio.SocketStream | None = None
    attached: trio.Event = field(default_factory=trio.Event)
    sending: trio.Lock = field(default_factory=trio.Lock)  # held while a message is sent to it
    waiting: dict[bytes, _Caller] = field(default_factory=dict)
    connections: int = 0
    callers: Counter[str] = field(default_factory=Counter)  # connections by address


class RelayServer:
    """Relays for nodes that take no connections. Its `methods` have to be served, and `run` has to run.

    Args:
        limits: How much it does for others.
        encrypts: Whether calls to this node are encrypted, and so prove their caller's key.

    Attributes:
        held: Counts the bytes that it holds, and all that have passed.
        port: Where its clients connect to it; 0 while it does not run.
    """

    def __init__(self, limits: RelayLimits | None = None, *, encrypts: bool = True) -> None:
        self.limits = limits or RelayLimits()
        self.held = Held()
        self.methods: Methods = {
            messages.RESERVE: SyncMethod(self.rpc_reserve, Reserve),
            messages.NEIGHBOURS: SyncMethod(self.rpc_neighbours, AskNeighbours),
        }
        self._encrypts = encrypts
        self._turns = FairTurns(self.limits.bytes_per_s)
        self._clients: dict[bytes, _Client] = {}  # by reservation
        self._by_name: dict[tuple[bytes, bytes], _Client] = {}  # by member and key
        self._ports: dict[tuple[bytes, bytes], int] = {}  # the last one of each, oldest first
        self._most = min(self.limits.connections, max(1, open_files() // FILES_PER_CONNECTION))
        self._listen: Callable[[int], trio.SocketListener] | None = None
        self._nursery: trio.Nursery | None = None
        self.port = 0
        self._connections = 0
        self._greeting = Counter[str]()  # connections that have not said yet whose they are, by address

    @property
    def clients(self) -> list[RelayedClient]:
        """The nodes that it relays for now."""
        attached = (client for client in self._clients.values() if client.attached.is_set())
        return [RelayedClient(client.key, client.port, client.connections) for client in attached]

    @property
    def connections(self) -> int:
        """How many connections it relays now."""
        return self._connections

    @property
    def is_full(self) -> bool:
        """Whether it relays as many connections as it can."""
        return self._connections >= self._most

    @property
    def free(self) -> int:
        """How many more nodes it can relay for."""
        return max(0, self.limits.clients - len(self._clients))

    async def run(
        self, host: str, ports: Sequence[int] = (), *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Relay until cancelled.

        Args:
            host: The address to listen at, that of the node.
            ports: The ports that it may use; by default any.
            task_status: Told when it is ready.

        Raises:
            LabkitError: It cannot listen there.
        """
        (listener,) = listen_at(host, ports)
        self.port = port_of(listener)
        self._listen = lambda port: listen_at(host, ports, port)[0]
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._turns.run)
                self._nursery.start_soon(accept_all, listener, self._greet, self._nursery)
                task_status.started()
        finally:
            self._listen = self._nursery = None
            for client in list(self._clients.values()):
                self._end(client)

    # ------------------------------------------------------------ what there is to share

    def open_port(self, wished: int = 0) -> trio.SocketListener:
        """Listen at one of its ports, `wished` if that is free.

        Raises:
            Overloaded: There is none left.
            RequestRefused: It does not run.
        """
        if self._listen is None:
            raise RequestRefused("this relay is closing")
        try:
            return self._listen(wished)
        except LabkitError as error:
            raise Overloaded(f"this relay has no port left: {error}") from None

    def share(self) -> Share:
        """Returns the share of somebody new of what can pass here."""
        return self._turns.share()

    @contextmanager
    def one_more_connection(self) -> Iterator[None]:
        """Count a connection while the block runs."""
        self._connections += 1
        try:
            yield
        finally:
            self._connections -= 1

    # ------------------------------------------------------------ reservations

    def rpc_reserve(self, request: Request) -> Reply:
        """Give the caller, or a server that it has started, a port, and tell it how to attach.

        What it had reserved before for the same node ends. A port under the key of a node that somebody else has
        started harms nobody, since whoever calls there expects the holder of that key.
        """
        member = request.peer.key or b""
        key: bytes = request.body.key
        name = member, key
        if self._listen is None or self._nursery is None:
            raise RequestRefused("this relay is closing")
        if self._encrypts and not member:
            raise RequestRefused("a relay gives ports only to those who prove a key")
        direct = request.body.direct
        if direct is not None and (direct.key != key or not direct.is_safe):
            raise BadRequest("that is not how this node is reached")
        before = self._by_name.get(name)
        if before is not None:
            self._end(before)
        if not self.free:
            many = f"{len(self._clients)} client{'s' * (len(self._clients) != 1)}"
            raise Overloaded(
                f"this relay has {many}, as many as it takes: lk.RelayLimits(clients=…) there, or --clients"
            )
        if sum(client.member == member for client in self._clients.values()) >= self.limits.clients_per_member:
            raise Overloaded("this relay has as many clients of this member of the swarm as it takes")
        listener = self.open_port(self._ports.get(name, 0))
        port = port_of(listener)
        id, secret = secrets.token_bytes(16), secrets.token_bytes(32)
        client = _Client(member, key, id, secret, port, listener, self.share(), direct=direct)
        self._clients[client.id] = self._by_name[name] = client
        self._ports.pop(name, None)
        self._ports[name] = port
        if len(self._ports) > MAX_KNOWN_PORTS:
            del self._ports[next(iter(self._ports))]
        self._nursery.start_soon(self._serve, client)
        return Reply(Reserved(client.id, client.secret, self.port, port))

    def rpc_neighbours(self, request: Request) -> Reply:
        """The other clients that come from the same address as the caller, and so may be in its network."""
        caller = self._by_name.get((request.peer.key or b"", request.body.key))
        if caller is None or caller.control is None:
            raise RequestRefused("this relay has no such client")
        host = peer_host(caller.control)
        others = (c for c in self._clients.values() if c is not caller and c.control is not None)
        near = [client.direct for client in others if client.control and peer_host(client.control) == host]
        return Reply(Neighbours([direct for direct in near if direct is not None][: messages.MAX_NEIGHBOURS]))

    def _end(self, client: _Client) -> None:
        """Close the port of a client and all of its connections."""
        if self._clients.pop(client.id, None) is not None:
            client.listener.socket.close()
            client.scope.cancel()
            if client.control is not None:
                client.control.socket.close()
            if self._by_name.get((client.member, client.key)) is client:
                del self._by_name[client.member, client.key]

    async def _serve(self, client: _Client) -> None:
        """1. Wait until the client attaches; 2. let callers in, 3. and tell it that we are there while it listens."""
        try:
            with client.scope:
                with trio.move_on_after(ATTACH_TIMEOUT):
                    await client.attached.wait()  # 1
                if client.control is None:
                    return
                async with trio.open_nursery() as nursery:
                    call = partial(self._call, client)
                    nursery.start_soon(accept_all, client.listener, call, nursery)  # 2
                    nursery.start_soon(self._keep_told, client)  # 3
        finally:
            self._end(client)

    async def _keep_told(self, client: _Client) -> None:
        while await self._tell(client, StillHere()):  # noqa: ASYNC110, a ping every second
            await trio.sleep(PING_PERIOD)

    async def _tell(self, client: _Client, message: Attached | Fetch | StillHere) -> bool:
        """Send a client a message. Returns whether it was taken in time; if not, the client is gone."""
        assert client.control is not None
        with trio.move_on_after(SILENCE), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with client.sending:
                await client.control.send_all(messages.encode(message))
            return True
        self._end(client)
        return False

    # ------------------------------------------------------------ connections of clients

    async def _greet(self, connection: trio.SocketStream) -> None:
        """Learn whose a connection to our port is, and what for."""
        stream: trio.SocketStream | None = connection
        host, reader = peer_host(connection), MessageReader(connection)
        try:
            hello = await self._read_hello(host, reader)
            client = self._clients.get(hello.reservation) if hello is not None else None
            if client is None:
                return
            if isinstance(hello, Attach):
                expected = messages.proof_of_attach(client.secret, client.id)
                if messages.same_proof(hello.proof, expected) and client.control is None:
                    await self._hold(client, connection, reader)
            elif isinstance(hello, Bring):
                caller = client.waiting.get(hello.caller)
                expected = messages.proof_of_bring(client.secret, client.id, hello.caller)
                if caller is not None and messages.same_proof(hello.proof, expected):
                    del client.waiting[hello.caller]
                    caller.fetched = connection, reader.rest
                    caller.news.set()
                    stream = None  # it is the caller's from now on
        finally:
            if stream is not None:
                await close_at_once(stream)

    async def _read_hello(self, host: str, reader: MessageReader) -> messages.Hello | None:
        greeting = self._greeting
        if greeting.total() >= MAX_GREETING or greeting[host] >= MAX_GREETING_PER_HOST:
            return None
        greeting[host] += 1
        try:
            with trio.move_on_after(HELLO_TIMEOUT):
                return await reader.read(messages.HELLO)
        except (BadRelayMessage, trio.BrokenResourceError):
            pass
        finally:
            greeting[host] -= 1
            if not greeting[host]:
                del greeting[host]
        return None

    async def _hold(self, client: _Client, stream: trio.SocketStream, reader: MessageReader) -> None:
        """Hold a client's control connection until the client is silent, or gone."""
        client.control = stream
        try:
            if not await self._tell(client, Attached()):
                return
            client.attached.set()
            while True:
                with trio.move_on_after(SILENCE) as limit:
                    if await reader.read(messages.STILL_HERE) is None:
                        return
                if limit.cancelled_caught:
                    return
                await trio.sleep(PING_PERIOD / 8)  # one that says it all the time is not listened to
        except (BadRelayMessage, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._end(client)

    # ------------------------------------------------------------ callers

    async def _call(self, client: _Client, stream: trio.SocketStream) -> None:
        """Let the client fetch a caller, and pass on what they say to each other."""
        host = peer_host(stream)
        if not self._has_room(client, host):
            await close_at_once(stream)
            return
        client.connections += 1
        client.callers[host] += 1
        id, caller = secrets.token_bytes(16), _Caller()
        client.waiting[id] = caller
        try:
            with self.one_more_connection():
                if not await self._tell(client, Fetch(id)):
                    return
                with trio.move_on_after(FETCH_TIMEOUT):
                    await caller.news.wait()
                if caller.fetched is not None:
                    fetched, first = caller.fetched
                    await splice(
                        fetched, stream, idle_timeout=self.limits.idle_timeout, held=self.held, turn=client.share.turn,
                        first=first,
                    )  # fmt: skip
        finally:
            client.waiting.pop(id, None)
            client.connections -= 1
            client.callers[host] -= 1
            if not client.callers[host]:
                del client.callers[host]
            await close_at_once(stream, *(caller.fetched or ())[:1])

    def _has_room(self, client: _Client, host: str) -> bool:
        limits = self.limits
        return (
            not self.is_full
            and client.connections < limits.connections_per_client
            and client.callers[host] < limits.connections_per_caller
            and len(client.waiting) < limits.waiting_per_client
        )
