"""Asking: a client makes calls to any node and waits for their answers. Every failure ends in a typed error.

Requests and answers cross in any order, matched by request id. A request carries what is left of its deadline, and a
caller that gives up tells the server so. The other side is `wire/rpc.serve_rpc`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from labkit.wire.budget import ByteBudget
from labkit.wire.endpoint import Endpoint
from labkit.wire.rpc import BULK, CONTROL, Reply, RPCLimits


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
    """A link and the calls that wait on it."""

    __slots__ = ("_limits", "link", "pending", "where")

    def __init__(self, endpoint: Endpoint, contact: Contact, limits: wire.FrameLimits) -> None:
        self.where = contact.endpoint
        self.pending: dict[int, _Pending] = {}
        self._limits = limits
        self.link = endpoint.connect(contact, self._settle, self._end)

    def _end(self, error: LabkitError) -> None:
        """The link is over: every waiting call fails with the reason."""
        failure = error if isinstance(error, RPCError) else ConnectionLost(str(error))
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
    """Calls to any node from one endpoint."""

    def __init__(self, endpoint: Endpoint, limits: RPCLimits | None = None) -> None:
        self.endpoint = endpoint
        self.limits = limits or RPCLimits()
        self._budget = ByteBudget(self.limits.bytes_per_peer, self.limits.bytes_total)
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
        taken = sent = False
        try:
            with trio.move_on_at(deadline):
                await self._budget.wait_and_take((contact, lane), size)  # 2
                taken = True
                if not connection.link.send_nowait(frames):  # 3
                    await connection.link.send(frames)
                sent = True
                await pending.arrived.wait()  # 4
        except LabkitError as error:
            pending.settle(error if isinstance(error, RPCError) else ConnectionLost(str(error)))
        finally:
            if taken:
                self._budget.give((contact, lane), size)
            del connection.pending[id]
            if sent and pending.outcome is None:  # timed out or cancelled: the server need not go on
                self._tell_cancelled(connection, id)
        if pending.outcome is None:
            if not sent and not connection.pending:
                self._drop(contact, lane, connection)  # TCP tries ever more rarely; the next call begins anew
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

    def _drop(self, contact: Contact, lane: str, connection: _Connection) -> None:
        if self._connections.get((contact, lane)) is connection:
            del self._connections[contact, lane]
            connection.link.close()

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
