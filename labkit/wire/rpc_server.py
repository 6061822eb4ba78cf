"""Remote calls, the side that answers. `wire/rpc_client` is the side that asks; their types are in `wire/rpc_types`.

A request carries what is left of its deadline; the server drops work that nobody waits for any more. Whatever fails
here ends in a typed error at the caller. Both sides run over any `Endpoint`.
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

SEND_TIMEOUT = 60.0  # seconds that an answer waits for room at most


async def serve_rpc(
    endpoint: Endpoint,
    methods: Methods,
    limits: RPCLimits | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer calls until cancelled. Whatever arrives, this goes on."""
    server = _Server(endpoint, methods, limits or RPCLimits())
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            await endpoint.serve(lambda peer, frames: server.accept(peer, frames, nursery))
    finally:
        server.over = True


class _Server:
    """The requests that are being answered."""

    def __init__(self, endpoint: Endpoint, methods: Methods, limits: RPCLimits) -> None:
        self.over = False  # then nobody is answered any more
        self._endpoint = endpoint
        self._methods = methods
        self._limits = limits
        self._budget = ByteBudget(limits.bytes_per_peer, limits.bytes_total)
        self._running: dict[tuple[bytes, int], trio.CancelScope | _PendingCallback] = {}
        self._running_of = Counter[bytes]()  # by the route of the peer
        self._turns: dict[bytes, trio.Lock] = {}  # of the answers that wait for room, by the same

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
        """Answer at once, if the method is quick and there is room for it; or later; or in a task; or refuse."""
        deadline = trio.current_time() + header.timeout_ms / 1000
        method, answer = self._methods.get(header.method), None
        if isinstance(method, SyncMethod) and self._takes_answers(peer, size):
            try:
                answer = _encode(id, header, method.handler(_request(peer, header, payload, method, deadline)))
            except Exception as error:
                answer = _encode_failure(id, header, error)
            if self._endpoint.send_nowait(peer, answer):
                return  # however much else is under way
        if not self._has_room(peer, size):
            self._refuse(peer, id, Overloaded.code, "too much is under way; try again or ask another")
            return
        self._budget.take(peer.route, size)
        self._running_of[peer.route] += 1
        if isinstance(method, CallbackMethod):
            later = self._running[peer.route, id] = _PendingCallback(self, peer, id, header, size, deadline, nursery)
            try:
                request = _request(peer, header, payload, method, deadline)
                later.forget = method.handler(request, later.answer)
            except Exception as error:
                later.answer(error)
            return
        scope = self._running[peer.route, id] = trio.CancelScope(deadline=deadline)
        nursery.start_soon(self._answer, peer, id, header, payload, size, scope, answer)

    def _has_room(self, peer: Peer, size: int) -> bool:
        most = self._limits.requests
        return (
            len(self._running) < most
            and self._running_of[peer.route] < max(1, most - most // 8)  # some are left for others
            and self._budget.fits(peer.route, size)
            and self._takes_answers(peer, size)
        )

    def _takes_answers(self, peer: Peer, size: int) -> bool:
        """Whether not too many bytes of answers wait to be taken, by this peer and by all."""
        untaken, limits = self._endpoint.unsent_bytes(peer), self._limits
        return untaken == 0 or (  # who takes them all is not refused for what others do
            untaken + size <= limits.bytes_per_peer and self._endpoint.unsent_total() + size <= limits.bytes_total
        )

    def _refuse(self, peer: Peer, id: int, code: str, text: str) -> None:
        self._endpoint.send_nowait(peer, wire.encode_error(id, code, text))

    def end(self, peer: Peer, id: int, size: int) -> None:
        """A request is over."""
        del self._running[peer.route, id]
        self._running_of[peer.route] -= 1
        if not self._running_of[peer.route]:
            del self._running_of[peer.route]
            self._turns.pop(peer.route, None)
        self._budget.give(peer.route, size)

    def send(
        self, peer: Peer, id: int, header: wire.RequestHeader, size: int, deadline: float,
        answer: Sequence[wire.Frame], nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        """Send the answer to a request that is running, in a task if there is no room."""
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
        """Send the answer, which is made here if it is not there yet."""
        try:
            with scope:
                if answer is None:
                    answer = await self._outcome(peer, id, header, payload, scope.deadline)
                if not self._endpoint.send_nowait(peer, answer):
                    scope.deadline = min(scope.deadline, trio.current_time() + SEND_TIMEOUT)
                    async with self._turns.setdefault(peer.route, trio.Lock()):
                        await self._endpoint.send(peer, answer)
        except ConnectionLost:
            pass  # the caller is gone; its side knows
        finally:
            self.end(peer, id, size)

    async def _outcome(
        self, peer: Peer, id: int, header: wire.RequestHeader, payload: Sequence[wire.Frame], deadline: float
    ) -> list[wire.Frame]:
        """The frames that answer a request: its result, or its failure as a code and a text."""
        try:
            method = self._methods.get(header.method)
            if not isinstance(method, AsyncMethod):
                raise UnknownMethod(f"there is no method {header.method[:80]!r} here")
            return _encode(id, header, await method.handler(_request(peer, header, payload, method, deadline)))
        except Exception as error:
            return _encode_failure(id, header, error)


class _PendingCallback:
    """A request that is answered by a call of `answer`. `forget`: see `CallbackMethod`."""

    __slots__ = ("_arguments", "_nursery", "_over", "_server", "forget")

    def __init__(
        self, server: _Server, peer: Peer, id: int, header: wire.RequestHeader, size: int, deadline: float,
        nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        self._server = server
        self._arguments = peer, id, header, size, deadline
        self._nursery = nursery
        self._over = False
        self.forget: Callable[[], object] | None = None

    def answer(self, outcome: Reply | Exception) -> None:
        """Send it, unless nobody wants it any more."""
        if self._over:
            return
        self._over, self.forget = True, None
        peer, id, header, size, deadline = self._arguments
        if trio.current_time() >= deadline or self._server.over:
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
        """Nobody waits for the answer any more."""
        if not self._over:
            self._over = True
            peer, id, _, size, _ = self._arguments
            self._server.end(peer, id, size)
            if self.forget is not None:
                self.forget()
                self.forget = None  # with all that it holds


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
    """A handler's failure, as a code and a text."""
    if isinstance(error, MalformedMessage):
        return wire.encode_error(id, BadRequest.code, str(error))
    if isinstance(error, RPCError):
        return wire.encode_error(id, error.code, str(error))
    logger.error("the handler of %s failed", header.method, exc_info=error)
    return wire.encode_error(id, RemoteFailure.code, f"{type(error).__name__}: {error}")
