"""Remote calls, the calling side: `Client` calls methods of any node. Every failure ends in a typed error.

On a batch's way it stands between `client/expert_client` and the network (`wire/zmq_transport`). Replies come back in
any order and are matched by request id. A request carries what is left of its deadline, and a caller that gives up
tells the server so. The other side is `wire/rpc_server`; their types are in `wire/rpc_types`.
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

LEAVING_PERIOD = 0.1  # seconds between two checks whether the frames of a call that has ended have left
LEAVING_TIMEOUT = 20.0  # seconds after which they are given up, and the link with them

OnDone = Callable[[Reply | RPCError], object]


class Call:
    """A call under way. It ends once: `done` is called with the reply or the failure, or it is cancelled before."""

    __slots__ = (
        "_client", "_connection", "_contact", "_done", "_frames", "_id", "_key", "_method", "_returns", "_sent",
        "_size", "_taken", "_timeout", "_timer", "_unsent",
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
        self._sent = self._size = 0  # bytes of the frames, and bytes that the call takes of the budget
        self._taken = False  # whether it has taken them
        self._unsent: Unsent | None = None  # None while it has not been sent
        self._timer: Timer | None = None  # of the deadline

    def start(self, frames: Sequence[wire.Frame], sent: int, size: int) -> None:
        """Steps 1 to 3 of `Client.begin`."""
        client = self._client
        self._frames, self._sent, self._size = frames, sent, size
        try:
            self._connection = client.connection(*self._key)  # 1
        except RPCError as error:
            self.settle(error)
            return
        self._connection.pending[self._id] = self
        self._timer = client.timers.at(trio.current_time() + self._timeout, self._expire)
        client.budget.take_when_it_fits(self._key, size, self._on_taken)  # 2

    def _on_taken(self) -> None:
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

    def on_reply(self, message: wire.Message) -> None:  # 4
        """End the call with what the peer answered."""
        outcome: Reply | RPCError
        try:
            outcome = self._read(message)
        except RPCError as error:
            outcome = error
        except Exception as error:  # the peer's fault: it must not end a link that other calls wait on
            outcome = BadReply(f"{self._contact.endpoint} sent an answer that cannot be read: {error!r}")
        self.settle(outcome)
        del outcome  # else this frame, which is in an error's traceback, would hold the error, in a cycle

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
        """End the call with this outcome. Does nothing if it has ended."""
        done = self._end()
        if done is not None:
            done(outcome)

    def cancel(self) -> None:
        """Give the call up and tell the server so. Does nothing if it has ended."""
        if self._end() is not None:
            self._tell_cancelled()

    def _expire(self) -> None:
        """End the call at its deadline."""
        done, connection = self._end(), self._connection
        if done is None or connection is None:
            return
        self._tell_cancelled()
        if self._unsent is None and not connection.pending:
            self._client.drop(*self._key, connection)  # TCP tries ever more rarely; the next call begins anew
        what = "gave no answer to" if self._unsent is not None else "could not be reached for"
        done(DeadlineExceeded(f"{self._contact.endpoint} {what} {self._method} within {self._timeout:.3g} s"))

    def _end(self) -> OnDone | None:
        """Release all that the call holds. Returns the callback for the outcome; None if the call had ended before."""
        done, self._done = self._done, None
        if done is not None and self._connection is not None:
            self._frames = ()
            self._connection.pending.pop(self._id, None)
            if self._timer is not None:
                self._client.timers.cancel(self._timer)
            if self._taken:
                self._return_bytes(trio.current_time() + LEAVING_TIMEOUT)
            else:
                self._client.budget.withdraw(self._on_taken)
        return done

    def _return_bytes(self, deadline: float) -> None:
        """Give the bytes back to the budget as soon as the frames have left this process.

        If they have not at `deadline`, the link is stuck: close it, and give them back.
        """
        assert self._connection is not None
        client, now = self._client, trio.current_time()
        have_left = self._unsent is None or self._unsent.done or self._connection.link.error is not None
        if have_left or now >= deadline:
            if not have_left:
                client.drop(*self._key, self._connection)
            client.budget.give(self._key, self._size)
        else:
            client.timers.at(now + LEAVING_PERIOD, self._return_bytes, deadline)

    def _tell_cancelled(self) -> None:
        if self._unsent is not None and self._connection is not None:
            try:
                self._connection.link.send_nowait(wire.encode_cancel(self._id))
            except LabkitError:
                pass  # the server is gone, and the request with it


class _Connection:
    """A link, and the calls that wait for replies over it."""

    __slots__ = ("_limits", "link", "pending", "where")

    def __init__(self, endpoint: Endpoint, contact: Contact, limits: wire.FrameLimits) -> None:
        self.where = contact.endpoint
        self.pending: dict[int, Call] = {}
        self._limits = limits
        self.link = endpoint.connect(contact, self._on_message, self._on_end)

    def _on_end(self, error: LabkitError) -> None:
        """Fail all waiting calls with the reason why the link has ended."""
        kind = type(error) if isinstance(error, RPCError) else ConnectionLost
        for call in list(self.pending.values()):
            call.settle(kind(*error.args))  # an error of its own for each, since each may be raised

    def _on_message(self, frames: Sequence[wire.Frame]) -> None:
        try:
            message = wire.decode(frames, self._limits)
        except LabkitError as error:
            call = self.pending.get(wire.peek_id(frames) or 0)
            if call is not None:
                kind = MessageTooLarge if isinstance(error, MessageTooLarge) else BadReply
                call.settle(kind(f"{self.where} sent a reply that cannot be read: {error}"))
            return
        call = self.pending.get(message.id)
        if call is not None:  # else the reply comes too late: its caller has given up
            call.on_reply(message)


class Client:
    """Makes calls to any node, from one endpoint. All of it belongs to one trio thread.

    It opens a link to a node when it is first called, one for each lane, and keeps it for later calls.
    """

    def __init__(self, endpoint: Endpoint, limits: RPCLimits | None = None) -> None:
        self.endpoint = endpoint
        self.timers = endpoint.timers
        self.limits = limits or RPCLimits()
        self.budget = ByteBudget(self.limits.bytes_per_peer, self.limits.bytes_total)
        self._connections: dict[tuple[Contact, str], _Connection] = {}  # least recently used first
        self._ids = itertools.count(1)

    @property
    def links(self) -> int:
        """The number of open links."""
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
        """Call a method of a node and wait for the reply, at most `timeout` seconds.

        The arguments are those of `begin`. Cancelling the call tells the server so. Raises a kind of `RPCError`.
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
        """Call a method of a node without a task that waits (see `wire/transport` on callbacks).

        1. Take a link to the node, or open one. 2. Wait until the bytes fit into the budget, 3. and until the link has
        room, and send. 4. Take the reply.

        Args:
            contact: The node to call.
            method: Name of the method.
            body: Anything that msgspec can encode, of the type that the method takes.
            tensors: Sent beside the body; leave them unchanged until the call has ended.
            done: Called once, within `timeout` seconds, with the reply or the failure: what the peer answered, or
                `DeadlineExceeded`, `ConnectionLost`, `BadReply`, `MessageTooLarge`.
            returns: Type of the reply's body.
            timeout: Seconds.
            lane: `CONTROL`, or `BULK` for what is large.
            codec: How to send floating-point tensors; a name of `compression.CODECS`.

        Raises:
            ValueError: The body or a tensor cannot be sent at all.
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
        """Returns the open link to a node, or a new one. Raises `ConnectionLost`."""
        key = (contact, lane)
        connection = self._connections.pop(key, None)
        if connection is None or connection.link.error is not None:
            connection = _Connection(self.endpoint, contact, self.limits.frames)
        self._connections[key] = connection  # now the most recently used
        if len(self._connections) > min(self.limits.links, self.endpoint.most_links):
            idle = next((k for k, c in self._connections.items() if not c.pending and c is not connection), None)
            if idle is not None:
                self._connections.pop(idle).link.close()
        return connection

    def drop(self, contact: Contact, lane: str, connection: _Connection) -> None:
        """Close this link, if it is still in use. Calls that wait on it fail."""
        if self._connections.get((contact, lane)) is connection:
            del self._connections[contact, lane]
            connection.link.close()

    def forget_all(self) -> None:
        """Close all links, as when the way to all others has changed. Calls that wait on them fail."""
        for contact, _ in list(self._connections):
            self.forget(contact)

    def renew(self, key: bytes) -> None:
        """Make new links to a node for later calls, as where it is called elsewhere; old ones end with their calls."""
        for place, connection in list(self._connections.items()):
            if place[0].key == key:
                del self._connections[place]
                self._close_when_idle(connection)

    def _close_when_idle(self, connection: _Connection) -> None:
        if connection.pending:
            self.timers.after(LEAVING_PERIOD, self._close_when_idle, connection)
        else:
            connection.link.close()

    def forget(self, contact: Contact) -> None:
        """Close the links to a node. Calls that wait on them fail."""
        for lane in (CONTROL, BULK):
            connection = self._connections.pop((contact, lane), None)
            if connection is not None:
                connection.link.close()
