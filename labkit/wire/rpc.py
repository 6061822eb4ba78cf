"""Remote calls: `Client` asks, `serve_rpc` answers, and a failure on either side ends in a typed error at the caller.

Requests and answers cross in any order, matched by request id. A request carries what is left of its deadline; the
server drops work that nobody waits for any more, and a caller that gives up tells it so. Both run over any `Endpoint`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio
from torch import Tensor

from labkit.contact import Contact
from labkit.errors import (
    BY_CODE,
    BadReply,
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    LabkitError,
    MalformedMessage,
    MessageTooLarge,
    Overloaded,
    RemoteFailure,
    RPCError,
    UnknownMethod,
    VersionMismatch,
)
from labkit.wire import frames as wire
from labkit.wire.budget import ByteBudget
from labkit.wire.endpoint import Endpoint, Link, Peer

logger = logging.getLogger(__name__)

CONTROL = "control"  # pings and look-ups: small and quick
BULK = "bulk"  # tensors


@dataclass(frozen=True, slots=True)
class RPCLimits:
    """Bounds of a node, as caller and as server."""

    frames: wire.FrameLimits = field(default_factory=wire.FrameLimits)
    bytes_per_peer: int = 256 << 20  # requests and untaken answers of one connection
    bytes_total: int = 1 << 30
    requests: int = 4096  # answered at the same time
    links: int = 512  # open at the same time; the one that was idle longest is closed first


@dataclass(frozen=True, slots=True)
class Request:
    """One call as its handler sees it. `deadline`: on trio's clock of this process."""

    method: str
    body: Any
    tensors: Sequence[Tensor]
    peer: Peer
    deadline: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a handler returns and `Client.call` gives: a body (anything msgspec can encode) and tensors.

    `bytes`: size of request and answer together, as the caller sees it.
    """

    body: Any = None
    tensors: Sequence[Tensor] = ()
    bytes: int = 0


Handler = Callable[[Request], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Method:
    """A handler and the type of body that it takes (checked before the handler runs; the rest is `BadRequest`)."""

    handler: Handler
    body: Any = None


class Caller(Protocol):
    """What a user of the wire needs of it: `Client`, or a fake in a test."""

    async def call(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        returns: Any = Any, timeout: float, lane: str = CONTROL, codec: str = "none",
    ) -> Reply: ...  # fmt: skip


# ---------------------------------------------------------------- asking


class _Pending:
    """A call that waits for its answer."""

    __slots__ = ("arrived", "outcome")

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.outcome: wire.Message | RPCError | None = None

    def settle(self, outcome: wire.Message | RPCError) -> None:
        self.outcome = self.outcome or outcome
        self.arrived.set()


class _Connection:
    """A link and the calls that wait on it. One task reads the answers."""

    def __init__(self, link: Link, where: str, limits: wire.FrameLimits) -> None:
        self.link = link
        self.where = where
        self.pending: dict[int, _Pending] = {}
        self._limits = limits

    async def read_answers(self) -> None:
        """Until the link is over; then every waiting call fails with the reason."""
        failure: LabkitError = ConnectionLost(f"the connection to {self.where} was closed")
        try:
            while True:
                for frames in await self.link.receive():
                    self._settle(frames)
        except LabkitError as error:
            failure = error
        finally:
            if not isinstance(failure, RPCError):
                failure = ConnectionLost(str(failure))
            self.link.close()
            for pending in self.pending.values():
                pending.settle(failure)

    def _settle(self, frames: Sequence[wire.Frame]) -> None:
        try:
            message = wire.decode(frames, self._limits)
        except LabkitError as error:
            id = wire.peek_id(frames)
            if id in self.pending:
                self.pending[id].settle(BadReply(f"{self.where} sent a reply that cannot be read: {error}"))
            return
        pending = self.pending.get(message.id)
        if pending is None:
            return  # too late: its caller has given up
        if message.version != wire.VERSION or message.kind is wire.Kind.VERSION:
            pending.settle(
                VersionMismatch(
                    f"{self.where} speaks version {message.version} of labkit's protocol, we speak {wire.VERSION}; "
                    "install the same labkit on both sides"
                )
            )
        else:
            pending.settle(message)


class Client:
    """Calls to any node from one endpoint. `run` must be running while it is used."""

    def __init__(self, endpoint: Endpoint, limits: RPCLimits | None = None) -> None:
        self.endpoint = endpoint
        self.limits = limits or RPCLimits()
        self._budget = ByteBudget(self.limits.bytes_per_peer, self.limits.bytes_total)
        self._connections: dict[tuple[Contact, str], _Connection] = {}  # the longest unused first
        self._ids = itertools.count(1)
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Holds the tasks that read answers, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def call(
        self,
        contact: Contact,
        method: str,
        body: Any = None,
        tensors: Sequence[Tensor] = (),
        *,
        returns: Any = Any,
        timeout: float,
        lane: str = CONTROL,
        codec: str = "none",
    ) -> Reply:
        """Ask a node and wait for the answer, at most `timeout` seconds.

        1. take a link to the node, or open one; 2. wait until the bytes fit into the budget; 3. send; 4. wait for the
        answer. `returns`: the type of the answer's body. Raises a kind of `RPCError`: what the peer answered, or
        `DeadlineExceeded`, `ConnectionLost`, `BadReply`, `MessageTooLarge`.
        """
        deadline = trio.current_time() + timeout
        id = next(self._ids)
        frames = wire.encode_request(id, method, timeout, body, tensors, codec)
        size = sum(map(len, frames))
        if size > self.limits.frames.message_bytes:
            raise MessageTooLarge(f"{method} with {size} bytes is over the {self.limits.frames.message_bytes} allowed")
        pending = _Pending()
        connection = self._connection(contact, lane)  # 1
        connection.pending[id] = pending
        sent = False
        try:
            with trio.move_on_at(deadline):
                async with self._budget.hold((contact, lane), size):  # 2
                    await connection.link.send(frames)  # 3
                    sent = True
                    await pending.arrived.wait()  # 4
        except LabkitError as error:
            pending.settle(error if isinstance(error, RPCError) else ConnectionLost(str(error)))
        finally:
            del connection.pending[id]
            if sent and pending.outcome is None:  # timed out or cancelled: the server need not go on
                self._tell_cancelled(connection, id)
        if pending.outcome is None:
            what = "gave no answer to" if sent else "could not be reached for"
            raise DeadlineExceeded(f"{contact.endpoint} {what} {method} within {timeout:.3g} s")
        return self._reply(pending.outcome, contact, returns, size)

    def _reply(self, outcome: wire.Message | RPCError, contact: Contact, returns: Any, sent: int) -> Reply:
        if isinstance(outcome, RPCError):
            raise type(outcome)(*outcome.args)  # a fresh one: several callers may raise the same failure
        header = outcome.header
        if isinstance(header, wire.ErrorHeader):
            raise BY_CODE.get(header.code, RemoteFailure)(f"{contact.endpoint}: {header.text}")
        if not isinstance(header, wire.ReplyHeader):
            raise BadReply(f"{contact.endpoint} answered with a {outcome.kind.name.lower()}")
        try:
            body = wire.decode_body(header.body, returns)
        except MalformedMessage as error:
            raise BadReply(f"{contact.endpoint} answered with something else than was asked for: {error}") from None
        received = len(header.body) + sum(map(len, outcome.payload))
        return Reply(body, wire.decode_tensors(header.tensors, outcome.payload), sent + received)

    def _connection(self, contact: Contact, lane: str) -> _Connection:
        if self._nursery is None:
            raise RuntimeError("the client is not running")
        key = (contact, lane)
        connection = self._connections.pop(key, None)
        if connection is None or connection.link.error is not None:
            connection = _Connection(self.endpoint.connect(contact), contact.endpoint, self.limits.frames)
            self._nursery.start_soon(connection.read_answers)
        self._connections[key] = connection  # now the last to be closed
        if len(self._connections) > self.limits.links:
            idle = next((k for k, c in self._connections.items() if not c.pending and c is not connection), None)
            if idle is not None:
                self._connections.pop(idle).link.close()
        return connection

    def _tell_cancelled(self, connection: _Connection, id: int) -> None:
        try:
            connection.link.send_nowait(wire.encode_cancel(id))
        except LabkitError:
            pass  # the server is gone, and the request with it

    def forget(self, contact: Contact) -> None:
        """Close the links to a node; calls that wait on them fail."""
        for lane in (CONTROL, BULK):
            connection = self._connections.pop((contact, lane), None)
            if connection is not None:
                connection.link.close()


# ---------------------------------------------------------------- answering


async def serve_rpc(
    endpoint: Endpoint,
    methods: Mapping[str, Method],
    limits: RPCLimits | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer calls until cancelled. Whatever arrives, this goes on."""
    server = _Server(endpoint, methods, limits or RPCLimits())
    async with trio.open_nursery() as nursery:
        task_status.started()
        while True:
            for peer, frames in await endpoint.receive():
                server.accept(peer, frames, nursery)


class _Server:
    """The requests that are being answered."""

    def __init__(self, endpoint: Endpoint, methods: Mapping[str, Method], limits: RPCLimits) -> None:
        self._endpoint = endpoint
        self._methods = methods
        self._limits = limits
        self._budget = ByteBudget(limits.bytes_per_peer, limits.bytes_total)
        self._running: dict[tuple[bytes, int], trio.CancelScope] = {}

    def accept(self, peer: Peer, frames: Sequence[wire.Frame], nursery: trio.Nursery) -> None:
        """Start to answer a request, or refuse it, or drop what is none."""
        try:
            message = wire.decode(frames, self._limits.frames)
        except LabkitError as error:
            id = wire.peek_id(frames)
            if id is not None:
                code = MessageTooLarge.code if isinstance(error, MessageTooLarge) else BadRequest.code
                self._refuse(peer, id, code, str(error))
            return
        if message.version != wire.VERSION:
            self._endpoint.send_nowait(peer, wire.encode_version(message.id))
        elif message.kind is wire.Kind.CANCEL:
            scope = self._running.get((peer.route, message.id))
            if scope is not None:
                scope.cancel()
        elif isinstance(message.header, wire.RequestHeader):
            size = sum(map(len, frames))
            if not self._has_room(peer, size):
                self._refuse(peer, message.id, Overloaded.code, "too much is under way; try again or ask another")
            elif (peer.route, message.id) not in self._running:
                self._budget.take(peer.route, size)
                scope = self._running[peer.route, message.id] = trio.CancelScope()
                nursery.start_soon(self._answer, peer, message.id, message.header, message.payload, size, scope)

    def _has_room(self, peer: Peer, size: int) -> bool:
        untaken = self._endpoint.unsent_bytes(peer)
        return (
            len(self._running) < self._limits.requests
            and self._budget.fits(peer.route, size)
            and (untaken == 0 or untaken + size <= self._limits.bytes_per_peer)
        )

    def _refuse(self, peer: Peer, id: int, code: str, text: str) -> None:
        self._endpoint.send_nowait(peer, wire.encode_error(id, code, text))

    async def _answer(
        self,
        peer: Peer,
        id: int,
        header: wire.RequestHeader,
        payload: Sequence[wire.Frame],
        size: int,
        scope: trio.CancelScope,
    ) -> None:
        scope.deadline = deadline = trio.current_time() + header.timeout_ms / 1000
        try:
            with scope:
                await self._endpoint.send(peer, await self._outcome(peer, id, header, payload, deadline))
        except ConnectionLost:
            pass  # the caller is gone; its side knows
        finally:
            del self._running[peer.route, id]
            self._budget.give(peer.route, size)

    async def _outcome(
        self, peer: Peer, id: int, header: wire.RequestHeader, payload: Sequence[wire.Frame], deadline: float
    ) -> list[wire.Frame]:
        """The frames that answer a request: its result, or its failure as a code and a text."""
        try:
            method = self._methods.get(header.method)
            if method is None:
                raise UnknownMethod(f"there is no method {header.method[:80]!r} here")
            body = wire.decode_body(header.body, method.body)
            tensors = wire.decode_tensors(header.tensors, payload)
            reply = await method.handler(Request(header.method, body, tensors, peer, deadline))
            codec = next((spec.codec for spec in header.tensors if spec.codec != "none"), "none")
            return wire.encode_reply(id, reply.body, reply.tensors, codec)
        except MalformedMessage as error:
            return wire.encode_error(id, BadRequest.code, str(error))
        except RPCError as error:
            return wire.encode_error(id, error.code, str(error))
        except Exception as error:
            logger.exception("the handler of %s failed", header.method)
            return wire.encode_error(id, RemoteFailure.code, f"{type(error).__name__}: {error}")
