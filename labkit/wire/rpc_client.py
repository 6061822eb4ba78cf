"""Asking: a client makes calls to any node and waits for their answers. Every failure ends in a typed error.

Requests and answers cross in any order, matched by request id. A request carries what is left of its deadline, and a
caller that gives up tells the server so. The other side is `wire/rpc_server.serve_rpc`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import trio
from torch import Tensor

from labkit.contact import Contact
from labkit.errors import (
    BY_CODE,
    BadReply,
    ConnectionLost,
    DeadlineExceeded,
    LabkitError,
    MalformedMessage,
    MessageTooLarge,
    RemoteFailure,
    RPCError,
    VersionMismatch,
)
from labkit.wire import frames as wire
from labkit.wire.rpc_types import BULK, CONTROL, ByteBudget, Reply, RPCLimits
from labkit.wire.timers import Timer
from labkit.wire.transport import Endpoint, Unsent, await_callback

LEAVING_PERIOD = 0.1  # seconds between two looks at whether a request that nobody waits for any more has left
LEAVING_TIMEOUT = 20.0  # seconds until it is given up, and the link with it

OnDone = Callable[[Reply | RPCError], object]


class Call:
    """A call that is under way. It ends once: `done` is told the answer or the failure, or it is cancelled before."""

    __slots__ = (
        "_alarm", "_client", "_connection", "_contact", "_done", "_frames", "_id", "_key", "_method", "_returns",
        "_sent", "_size", "_taken", "_timeout", "_unsent",
    )  # fmt: skip

    def __init__(
        self, client: Client, id: int, contact: Contact, lane: str, method: str, returns: Any, timeout: float,
        done: OnDone,
    ) -> None:  # fmt: skip
        self._client = client
        self._id = id
        self._contact = contact
        self._key = contact, lane
        self._method = method
        self._returns = returns
        self._timeout = timeout
        self._done: OnDone | None = done
        self._connection: _Connection | None = None
        self._frames: Sequence[wire.Frame] = ()
        self._sent = self._size = 0  # bytes of the frames, and those that it takes of the budget
        self._taken = False
        self._unsent: Unsent | None = None  # None: it has not been sent
        self._alarm: Timer | None = None

    def start(self, frames: Sequence[wire.Frame], sent: int, size: int) -> None:
        """See `Client.begin`, 1 to 3."""
        client = self._client
        self._frames, self._sent, self._size = frames, sent, size
        try:
            self._connection = client.connection(*self._key)  # 1
        except RPCError as error:
            self.settle(error)
            return
        self._connection.pending[self._id] = self
        self._alarm = client.timers.at(trio.current_time() + self._timeout, self._expire)
        client.budget.take_when_it_fits(self._key, size, self._take)  # 2

    def _take(self) -> None:
        self._taken = True
        self._send()

    def _send(self) -> None:  # 3
        if self._done is None:
            return
        assert self._connection is not None
        link = self._connection.link
        try:
            self._unsent = link.send_nowait(self._frames)
        except LabkitError as error:
            self.settle(error if isinstance(error, RPCError) else ConnectionLost(str(error)))
            return
        if self._unsent is not None:
            self._frames = ()
        else:
            link.when_ready(self._send)

    def hear(self, message: wire.Message) -> None:
        """The answer has come."""
        outcome: Reply | RPCError
        try:
            outcome = self._read(message)
        except RPCError as error:
            outcome = error
        except Exception as error:  # it is the peer's doing, and must not end the link on which others wait, too
            outcome = BadReply(f"{self._contact.endpoint} sent an answer that cannot be read: {error!r}")
        self.settle(outcome)

    def _read(self, message: wire.Message) -> Reply:
        header, where = message.header, self._contact.endpoint
        if message.version != wire.VERSION or message.kind is wire.Kind.VERSION:
            raise VersionMismatch(
                f"{where} speaks version {message.version} of labkit's protocol, we speak {wire.VERSION}; "
                "install the same labkit on both sides"
            )
        if isinstance(header, wire.ErrorHeader):
            raise BY_CODE.get(header.code, RemoteFailure)(f"{where}: {header.text}")
        if not isinstance(header, wire.ReplyHeader):
            raise BadReply(f"{where} answered with a {message.kind.name.lower()}")
        try:
            body = wire.decode_body(header.body, self._returns)
        except MalformedMessage as error:
            raise BadReply(f"{where} answered with something else than was asked for: {error}") from None
        received = len(header.body) + sum(map(len, message.payload))
        return Reply(body, wire.decode_tensors(header.tensors, message.payload), self._sent + received)

    def settle(self, outcome: Reply | RPCError) -> None:
        """It is over."""
        done = self._end()
        if done is not None:
            done(outcome)

    def cancel(self) -> None:
        """Nobody waits for the answer any more; the server is told so. Does nothing when it is over."""
        if self._end() is not None:
            self._tell_cancelled()

    def _expire(self) -> None:
        done, connection = self._end(), self._connection
        if done is None or connection is None:
            return
        self._tell_cancelled()
        if self._unsent is None and not connection.pending:
            self._client.drop(*self._key, connection)  # TCP tries ever more rarely; the next call begins anew
        what = "gave no answer to" if self._unsent is not None else "could not be reached for"
        done(DeadlineExceeded(f"{self._contact.endpoint} {what} {self._method} within {self._timeout:.3g} s"))

    def _end(self) -> OnDone | None:
        """Leave nothing behind. Returns whom to tell, if it is not over already."""
        done, self._done = self._done, None
        if done is not None and self._connection is not None:
            self._frames = ()
            self._connection.pending.pop(self._id, None)
            if self._alarm is not None:
                self._client.timers.cancel(self._alarm)
            if self._taken:
                self._give_back(trio.current_time() + LEAVING_TIMEOUT)
            else:
                self._client.budget.forget(self._take)
        return done

    def _give_back(self, at_last: float) -> None:
        """Others may have its bytes of the budget, when its frames have left; until then they are in the way."""
        assert self._connection is not None
        client, now = self._client, trio.current_time()
        gone = self._unsent is None or self._unsent.done or self._connection.link.error is not None
        if gone or now >= at_last:
            if not gone:
                client.drop(*self._key, self._connection)
            client.budget.give(self._key, self._size)
        else:
            client.timers.at(now + LEAVING_PERIOD, self._give_back, at_last)

    def _tell_cancelled(self) -> None:
        if self._unsent is not None and self._connection is not None:
            try:
                self._connection.link.send_nowait(wire.encode_cancel(self._id))
            except LabkitError:
                pass  # the server is gone, and the request with it


class _Connection:
    """A link and the calls that wait on it."""

    __slots__ = ("_limits", "link", "pending", "where")

    def __init__(self, endpoint: Endpoint, contact: Contact, limits: wire.FrameLimits) -> None:
        self.where = contact.endpoint
        self.pending: dict[int, Call] = {}
        self._limits = limits
        self.link = endpoint.connect(contact, self._hear, self._end)

    def _end(self, error: LabkitError) -> None:
        """The link is over: every waiting call fails with the reason."""
        kind = type(error) if isinstance(error, RPCError) else ConnectionLost
        for call in list(self.pending.values()):
            call.settle(kind(*error.args))  # each with an error of its own, since each may be raised

    def _hear(self, frames: Sequence[wire.Frame]) -> None:
        try:
            message = wire.decode(frames, self._limits)
        except LabkitError as error:
            call = self.pending.get(wire.peek_id(frames) or 0)
            if call is not None:
                call.settle(BadReply(f"{self.where} sent a reply that cannot be read: {error}"))
            return
        call = self.pending.get(message.id)
        if call is not None:  # or it comes too late: its caller has given up
            call.hear(message)


class Client:
    """Calls to any node from one endpoint."""

    def __init__(self, endpoint: Endpoint, limits: RPCLimits | None = None) -> None:
        self.endpoint = endpoint
        self.timers = endpoint.timers
        self.limits = limits or RPCLimits()
        self.budget = ByteBudget(self.limits.bytes_per_peer, self.limits.bytes_total)
        self._connections: dict[tuple[Contact, str], _Connection] = {}  # the longest unused first
        self._ids = itertools.count(1)

    @property
    def links(self) -> int:
        """How many links are open."""
        return len(self._connections)

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
        """`begin`, awaited: ask a node and wait for the answer, at most `timeout` seconds.

        Raises a kind of `RPCError`.
        """

        def begin(done: OnDone) -> Call:
            return self.begin(
                contact, method, body, tensors, done=done, returns=returns, timeout=timeout, lane=lane, codec=codec
            )

        return await await_callback(begin)

    def begin(
        self,
        contact: Contact,
        method: str,
        body: Any = None,
        tensors: Sequence[Tensor] = (),
        *,
        done: OnDone,
        returns: Any = Any,
        timeout: float,
        lane: str = CONTROL,
        codec: str = "none",
    ) -> Call:
        """Ask a node, without a task that waits: `done` is told the answer, or the failure, within `timeout` seconds.

        1. take a link to the node, or open one; 2. as soon as the bytes fit into the budget, and 3. the link has room,
        send; 4. hear the answer. `returns`: the type of the answer's body. `done` is called once, in the thread of
        trio, perhaps before this returns. Failures are what the peer answered, or `DeadlineExceeded`, `ConnectionLost`,
        `BadReply`, `MessageTooLarge`. Raises `ValueError` for what cannot be sent at all.
        """
        id = next(self._ids)
        frames = wire.encode_request(id, method, timeout, body, tensors, codec)
        sent = sum(map(len, frames))
        size = max(sent, sum(tensor.nbytes for tensor in tensors))  # as the server counts: see `Message.size`
        call = Call(self, id, contact, lane, method, returns, timeout, done)
        limit = self.limits.frames.message_bytes
        if size > limit:
            call.settle(MessageTooLarge(f"{method} with {size} bytes is over the {limit} allowed"))
        else:
            call.start(frames, sent, size)
        return call

    def connection(self, contact: Contact, lane: str) -> _Connection:
        """An open link to a node, or a new one. Raises `ConnectionLost`."""
        key = (contact, lane)
        connection = self._connections.pop(key, None)
        if connection is None or connection.link.error is not None:
            connection = _Connection(self.endpoint, contact, self.limits.frames)
        self._connections[key] = connection  # now the last to be closed
        if len(self._connections) > min(self.limits.links, self.endpoint.most_links):
            idle = next((k for k, c in self._connections.items() if not c.pending and c is not connection), None)
            if idle is not None:
                self._connections.pop(idle).link.close()
        return connection

    def drop(self, contact: Contact, lane: str, connection: _Connection) -> None:
        """Close a link."""
        if self._connections.get((contact, lane)) is connection:
            del self._connections[contact, lane]
            connection.link.close()

    def forget(self, contact: Contact) -> None:
        """Close the links to a node; calls that wait on them fail."""
        for lane in (CONTROL, BULK):
            connection = self._connections.pop((contact, lane), None)
            if connection is not None:
                connection.link.close()
