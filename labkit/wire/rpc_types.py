"""The words of remote calls: what a node offers, what a handler is given and answers, and what may ask.

`wire/rpc_server.serve_rpc` answers, `wire/rpc_client.Client` asks.
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

CONTROL = "control"  # pings and look-ups: small and quick
BULK = "bulk"  # tensors


@dataclass(frozen=True, slots=True)
class RPCLimits:
    """Bounds of a node, as caller and as server."""

    frames: wire.FrameLimits = field(default_factory=wire.FrameLimits)
    bytes_per_peer: int = 256 << 20  # requests, decoded, and untaken answers of one connection
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


AsyncHandler = Callable[[Request], Awaitable[Reply]]
SyncHandler = Callable[[Request], Reply]


@dataclass(frozen=True, slots=True)
class AsyncMethod:
    """A handler and the type of body that it takes (checked before the handler runs; the rest is `BadRequest`)."""

    handler: AsyncHandler
    body: Any = None


@dataclass(frozen=True, slots=True)
class SyncMethod:
    """A method whose handler waits for nothing, and so is answered without a task of its own."""

    handler: SyncHandler
    body: Any = None


RespondFn = Callable[[Reply | Exception], None]
CallbackHandler = Callable[[Request, RespondFn], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class CallbackMethod:
    """A method that is answered later, without a task that waits: its handler is given what to call with the answer,
    which it does once, at the latest soon after the deadline. It returns what is called if nobody wants one any more.
    """

    handler: CallbackHandler
    body: Any = None


Methods = Mapping[str, AsyncMethod | SyncMethod | CallbackMethod]


class Caller(Protocol):
    """What a user of the wire needs of it: `Client`, or a fake in a test."""

    async def call(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        returns: Any = Any, timeout: float, lane: str = CONTROL, codec: str = "none",
    ) -> Reply: ...  # fmt: skip

    def begin(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        done: Callable[[Reply | RPCError], object], returns: Any = Any, timeout: float, lane: str = CONTROL,
        codec: str = "none",
    ) -> Cancellable: ...  # fmt: skip


Go = Callable[[], object]


@dataclass
class ByteBudget:
    """Bytes that are taken, by peer. A message over a limit may go when nothing else of that peer is under way."""

    per_peer: int
    total: int
    taken: int = 0
    by_peer: dict[Hashable, int] = field(default_factory=dict)
    _waiting: dict[Go, tuple[Hashable, int]] = field(default_factory=dict)  # the longest first
    _letting_go: bool = False

    def fits(self, peer: Hashable, size: int) -> bool:
        """Whether `size` more bytes for this peer are within the budget."""
        mine = self.by_peer.get(peer, 0)
        return (mine == 0 or mine + size <= self.per_peer) and (self.taken == 0 or self.taken + size <= self.total)

    def take(self, peer: Hashable, size: int) -> None:
        """Count bytes in; each is to be given back with `give`."""
        self.taken += size
        self.by_peer[peer] = self.by_peer.get(peer, 0) + size

    def take_when_it_fits(self, peer: Hashable, size: int, go: Go) -> None:
        """Count the bytes in and call `go`, now or when others have been given back, unless it is told to `forget`."""
        if self.fits(peer, size):
            self.take(peer, size)
            go()
        else:
            self._waiting[go] = peer, size

    def forget(self, go: Go) -> None:
        """It waits no more."""
        self._waiting.pop(go, None)

    def give(self, peer: Hashable, size: int) -> None:
        """Count bytes out."""
        self.taken -= size
        self.by_peer[peer] -= size
        if self.by_peer[peer] == 0:
            del self.by_peer[peer]
        if not self._letting_go:  # what goes may give back at once, and so let others go: in a loop, not ever deeper
            self._letting_go = True
            try:
                while (go := self._next()) is not None:
                    self.take(*self._waiting.pop(go))
                    go()
            finally:
                self._letting_go = False

    def _next(self) -> Go | None:
        return next((go for go, wanted in self._waiting.items() if self.fits(*wanted)), None)
