"""The types of remote calls: methods and their handlers, requests and replies, limits, and the budget of bytes.

`wire/rpc_client.Client` makes calls, `wire/rpc_server.serve_rpc` answers them; both import this module.

Order: limits, what a call carries, what a node offers (its methods), what callers need (`Caller`), bytes in flight.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from labkit.contact import Contact
from labkit.errors import RPCError
from labkit.wire import frames as wire
from labkit.wire.transport import Cancellable, Peer

CONTROL = "control"  # the lane of pings and look-ups: small and quick
BULK = "bulk"  # the lane of tensors


@dataclass(frozen=True, slots=True)
class RPCLimits:
    """The limits of a node, as caller and as server.

    Args:
        frames: Limits of one message.
        bytes_per_peer: Bytes of one connection that are under way: decoded requests, and answers not taken yet.
        bytes_total: The same of all connections together.
        requests: How many requests are answered at the same time.
        links: How many links may be open; beyond, the one that has been idle for longest is closed.
    """

    frames: wire.FrameLimits = field(default_factory=wire.FrameLimits)
    bytes_per_peer: int = 256 << 20
    bytes_total: int = 1 << 30
    requests: int = 4096
    links: int = 512


@dataclass(frozen=True, slots=True)
class Request:
    """One call as its handler sees it. `deadline` is on trio's clock of this process."""

    method: str
    body: Any
    tensors: Sequence[Tensor]
    peer: Peer
    deadline: float


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a call: what a handler returns, and what `Client.call` returns to the caller.

    Args:
        body: Anything that msgspec can encode.
        tensors: Sent as raw frames after the body.
        bytes: Size of request and reply together; set on the caller's side only.
    """

    body: Any = None
    tensors: Sequence[Tensor] = ()
    bytes: int = 0


AsyncHandler = Callable[[Request], Awaitable[Reply]]
SyncHandler = Callable[[Request], Reply]


@dataclass(frozen=True, slots=True)
class AsyncMethod:
    """A method whose handler may wait: each request gets a task of its own.

    `body` is the type of body that it takes. A request with another body fails with `BadRequest` and never reaches the
    handler.
    """

    handler: AsyncHandler
    body: Any = None


@dataclass(frozen=True, slots=True)
class SyncMethod:
    """A method whose handler waits for nothing. It is called right where a request arrives, without a task."""

    handler: SyncHandler
    body: Any = None


RespondFn = Callable[[Reply | Exception], None]
CallbackHandler = Callable[[Request, RespondFn], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class CallbackMethod:
    """A method that is answered later, without a task that waits. Calls to experts are such methods.

    Its handler is called with the request and `respond`, which it calls once with the reply or the failure, at the
    latest soon after the deadline. It returns a function that is called if the caller gives up before.
    """

    handler: CallbackHandler
    body: Any = None


Methods = Mapping[str, AsyncMethod | SyncMethod | CallbackMethod]


class Caller(Protocol):
    """Whatever can make remote calls: `Client`, or a fake in a test."""

    async def call(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        returns: Any = Any, timeout: float, lane: str = CONTROL, codec: str = "none",
    ) -> Reply: ...  # fmt: skip

    def begin(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        done: Callable[[Reply | RPCError], object], returns: Any = Any, timeout: float, lane: str = CONTROL,
        codec: str = "none",
    ) -> Cancellable: ...  # fmt: skip


OnTaken = Callable[[], object]


@dataclass
class ByteBudget:
    """Counts the bytes that are under way, by peer, and lets others wait for theirs.

    A message over a limit is let through when nothing else of that peer (or of all peers) is under way.
    """

    per_peer: int  # bytes
    total: int  # bytes
    taken: int = 0
    by_peer: dict[Hashable, int] = field(default_factory=dict)
    _waiting: dict[OnTaken, tuple[Hashable, int]] = field(default_factory=dict)  # peer and bytes; first come first
    _admitting: bool = False

    def fits(self, peer: Hashable, size: int) -> bool:
        """Whether `size` more bytes for this peer are within the budget."""
        mine = self.by_peer.get(peer, 0)
        return (mine == 0 or mine + size <= self.per_peer) and (self.taken == 0 or self.taken + size <= self.total)

    def take(self, peer: Hashable, size: int) -> None:
        """Count `size` bytes in. Each of them has to be given back by `give`."""
        self.taken += size
        self.by_peer[peer] = self.by_peer.get(peer, 0) + size

    def take_when_it_fits(self, peer: Hashable, size: int, on_taken: OnTaken) -> None:
        """Take the bytes as soon as they fit, now or when others are given back, and call `on_taken`.

        `withdraw` ends the wait.
        """
        if self.fits(peer, size):
            self.take(peer, size)
            on_taken()
        else:
            self._waiting[on_taken] = peer, size

    def withdraw(self, on_taken: OnTaken) -> None:
        """End the wait of `take_when_it_fits`. Does nothing if the bytes were taken."""
        self._waiting.pop(on_taken, None)

    def give(self, peer: Hashable, size: int) -> None:
        """Count `size` bytes out, and let those that wait take theirs."""
        self.taken -= size
        self.by_peer[peer] -= size
        if self.by_peer[peer] == 0:
            del self.by_peer[peer]
        if not self._admitting:  # a callback may give bytes back at once: then this loop goes on, and does not nest
            self._admitting = True
            try:
                while (on_taken := self._next()) is not None:
                    self.take(*self._waiting.pop(on_taken))
                    on_taken()
            finally:
                self._admitting = False

    def _next(self) -> OnTaken | None:
        return next((on_taken for on_taken, wanted in self._waiting.items() if self.fits(*wanted)), None)
