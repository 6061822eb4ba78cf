"""Remote calls, the answering side: `serve_rpc` answers the requests that arrive at an endpoint.

On a batch's way it stands between the network (`wire/zmq_transport`) and the handlers of `server/server`. A request
carries what is left of its deadline, and the server drops work whose caller has given up. Whatever fails here ends
in a typed error at the caller. The other side is `wire/rpc_client`; their types are in `wire/rpc_types`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import trio

from labkit.errors import (
    BadRequest,
    ConnectionLost,
    LabkitError,
    MalformedMessage,
    MessageTooLarge,
    Overloaded,
    RemoteFailure,
    RPCError,
    UnknownMethod,
)
from labkit.wire import frames as wire
from labkit.wire.rpc_types import (
    AsyncMethod,
    ByteBudget,
    CallbackMethod,
    Methods,
    Reply,
    Request,
    RPCLimits,
    SyncMethod,
)
from labkit.wire.transport import Endpoint, Peer

logger = logging.getLogger(__name__)

SEND_TIMEOUT = 60.0  # seconds that an answer waits for room, at most


async def serve_rpc(
    endpoint: Endpoint,
    methods: Methods,
    limits: RPCLimits | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer calls until cancelled. No message that arrives can end this.

    Args:
        endpoint: Where requests arrive.
        methods: The methods that this node offers, by name.
        limits: How much may be under way; beyond, requests are refused with `Overloaded`.
        task_status: Told when this is ready.
    """
    server = _Server(endpoint, methods, limits or RPCLimits())
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            await endpoint.serve(lambda peer, frames: server.accept(peer, frames, nursery))
    finally:
        server.closed = True


class _Server:
    """Answers the requests of one endpoint, and knows those that are under way."""

    def __init__(self, endpoint: Endpoint, methods: Methods, limits: RPCLimits) -> None:
        self.closed = False  # whether answers are dropped
        self._endpoint = endpoint
        self._methods = methods
        self._limits = limits
        self._budget = ByteBudget(limits.bytes_per_peer, limits.bytes_total)
        self._running: dict[tuple[bytes, int], trio.CancelScope | _PendingRequest] = {}
        self._running_of = Counter[bytes]()  # how many requests, by the peer's route
        self._send_locks: dict[bytes, trio.Lock] = {}  # for answers that wait for room, by the peer's route

    def accept(self, peer: Peer, frames: Sequence[wire.Frame], nursery: trio.Nursery) -> None:
        """Take a message: begin to answer a request, refuse it, cancel one, or drop what is no request."""
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
        elif isinstance(message.header, wire.RequestHeader) and (peer.route, message.id) not in self._running:
            self._begin(peer, message.id, message.header, message.payload, message.size, nursery)

    def _begin(
        self,
        peer: Peer,
        id: int,
        header: wire.RequestHeader,
        payload: Sequence[wire.Frame],
        size: int,
        nursery: trio.Nursery,
    ) -> None:
        """Answer a request in the way of its method.

        A `SyncMethod` answers at once, if the network has room for the answer. A `CallbackMethod` answers later, all
        others in a task of their own. If too much is under way, the request is refused.
        """
        deadline = trio.current_time() + header.timeout_ms / 1000
        method, answer = self._methods.get(header.method), None
        if isinstance(method, SyncMethod) and self._takes_answers(peer, size):
            try:
                answer = _encode(id, header, method.handler(_request(peer, header, payload, method, deadline)))
            except Exception as error:
                answer = _encode_failure(id, header, error)
            if self._endpoint.send_nowait(peer, answer):
                return  # answered, however much else is under way
        if not self._has_room(peer, size):
            self._refuse(peer, id, Overloaded.code, "too much is under way; try again or ask another")
            return
        self._budget.take(peer.route, size)
        self._running_of[peer.route] += 1
        if isinstance(method, CallbackMethod):
            pending = self._running[peer.route, id] = _PendingRequest(self, peer, id, header, size, deadline, nursery)
            try:
                request = _request(peer, header, payload, method, deadline)
                pending.wait(method.handler(request, pending.respond))
            except Exception as error:
                pending.respond(error)
            return
        scope = self._running[peer.route, id] = trio.CancelScope(deadline=deadline)
        nursery.start_soon(self._answer, peer, id, header, payload, size, scope, answer)

    def _has_room(self, peer: Peer, size: int) -> bool:
        most = self._limits.requests
        return (
            len(self._running) < most
            and self._running_of[peer.route] < max(1, most - most // 8)  # one peer leaves some for others
            and self._budget.fits(peer.route, size)
            and self._takes_answers(peer, size)
        )

    def _takes_answers(self, peer: Peer, size: int) -> bool:
        """Whether the answers that wait to be taken, by this peer and by all, leave room for one more request."""
        untaken, limits = self._endpoint.unsent_bytes(peer), self._limits
        return untaken == 0 or (  # a peer that takes its answers is not refused because others do not
            untaken + size <= limits.bytes_per_peer and self._endpoint.unsent_total() + size <= limits.bytes_total
        )

    def _refuse(self, peer: Peer, id: int, code: str, text: str) -> None:
        self._endpoint.send_nowait(peer, wire.encode_error(id, code, text))

    def end(self, peer: Peer, id: int, size: int) -> None:
        """Forget a request that was answered, or is not to be answered any more."""
        del self._running[peer.route, id]
        self._running_of[peer.route] -= 1
        if not self._running_of[peer.route]:
            del self._running_of[peer.route]
            self._send_locks.pop(peer.route, None)
        self._budget.give(peer.route, size)

    def send(
        self, peer: Peer, id: int, header: wire.RequestHeader, size: int, deadline: float,
        answer: Sequence[wire.Frame], nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        """Send the answer to a request. If there is no room now, a task waits for it."""
        if self._endpoint.send_nowait(peer, answer):
            self.end(peer, id, size)
        else:
            scope = self._running[peer.route, id] = trio.CancelScope(deadline=deadline)
            nursery.start_soon(self._answer, peer, id, header, (), size, scope, answer)

    async def _answer(
        self,
        peer: Peer,
        id: int,
        header: wire.RequestHeader,
        payload: Sequence[wire.Frame],
        size: int,
        scope: trio.CancelScope,
        answer: Sequence[wire.Frame] | None,
    ) -> None:
        """Compute the answer, if it is None, and send it when there is room."""
        try:
            with scope:
                if answer is None:
                    answer = await self._outcome(peer, id, header, payload, scope.deadline)
                if not self._endpoint.send_nowait(peer, answer):
                    scope.deadline = min(scope.deadline, trio.current_time() + SEND_TIMEOUT)
                    async with self._send_locks.setdefault(peer.route, trio.Lock()):
                        await self._endpoint.send(peer, answer)
        except ConnectionLost:
            pass  # the caller is gone; its side knows
        finally:
            self.end(peer, id, size)

    async def _outcome(
        self, peer: Peer, id: int, header: wire.RequestHeader, payload: Sequence[wire.Frame], deadline: float
    ) -> list[wire.Frame]:
        """Returns the frames that answer a request: its result, or its failure as a code and a text."""
        try:
            method = self._methods.get(header.method)
            if not isinstance(method, AsyncMethod):
                raise UnknownMethod(f"there is no method {header.method[:80]!r} here")
            return _encode(id, header, await method.handler(_request(peer, header, payload, method, deadline)))
        except Exception as error:
            return _encode_failure(id, header, error)


class _PendingRequest:
    """A request to a `CallbackMethod` that waits for the handler to call `respond`."""

    __slots__ = ("_answered", "_arguments", "_nursery", "_on_cancel", "_server")

    def __init__(
        self, server: _Server, peer: Peer, id: int, header: wire.RequestHeader, size: int, deadline: float,
        nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        self._server = server
        self._arguments = peer, id, header, size, deadline
        self._nursery = nursery
        self._answered = False  # or given up
        self._on_cancel: Callable[[], object] | None = None

    def wait(self, on_cancel: Callable[[], object]) -> None:
        """Wait, unless it was answered at once. `on_cancel`: called if the caller gives up; let go of once answered."""
        if not self._answered:
            self._on_cancel = on_cancel

    def respond(self, outcome: Reply | Exception) -> None:
        """Send this answer, unless there was one, or the caller has given up, or the deadline has passed."""
        if self._answered:
            return
        self._answered, self._on_cancel = True, None
        peer, id, header, size, deadline = self._arguments
        if trio.current_time() >= deadline or self._server.closed:
            self._server.end(peer, id, size)
            return
        try:
            if isinstance(outcome, Exception):
                raise outcome
            frames = _encode(id, header, outcome)
        except Exception as error:
            frames = _encode_failure(id, header, error)
        self._server.send(*self._arguments, frames, self._nursery)

    def cancel(self) -> None:
        """Give the request up, and tell its handler."""
        if not self._answered:
            self._answered = True
            peer, id, _, size, _ = self._arguments
            self._server.end(peer, id, size)
            if self._on_cancel is not None:
                self._on_cancel()
                self._on_cancel = None  # which lets go of all that it refers to


def _request(
    peer: Peer, header: wire.RequestHeader, payload: Sequence[wire.Frame],
    method: AsyncMethod | SyncMethod | CallbackMethod, deadline: float,
) -> Request:  # fmt: skip
    body = wire.decode_body(header.body, method.body)
    return Request(header.method, body, wire.decode_tensors(header.tensors, payload), peer, deadline)


def _encode(id: int, header: wire.RequestHeader, reply: Reply) -> list[wire.Frame]:
    codec = next((spec.codec for spec in header.tensors if spec.codec != "none"), "none")
    return wire.encode_reply(id, reply.body, reply.tensors, codec)


def _encode_failure(id: int, header: wire.RequestHeader, error: Exception) -> list[wire.Frame]:
    """Returns the frames of a handler's failure: a code and a text."""
    if isinstance(error, MalformedMessage):
        return wire.encode_error(id, BadRequest.code, str(error))
    if isinstance(error, RPCError):
        return wire.encode_error(id, error.code, str(error))
    logger.error("the handler of %s failed", header.method, exc_info=error)
    return wire.encode_error(id, RemoteFailure.code, f"{type(error).__name__}: {error}")
