"""The words of remote calls: what a node offers, what a handler is given and answers, and what may ask.

`wire/rpc.serve_rpc` answers, `wire/client.Client` asks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from labkit.contact import Contact
from labkit.errors import RPCError
from labkit.wire import frames as wire
from labkit.wire.awaiting import UnderWay
from labkit.wire.endpoint import Peer

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


Handler = Callable[[Request], Awaitable[Reply]]
QuickHandler = Callable[[Request], Reply]


@dataclass(frozen=True, slots=True)
class Method:
    """A handler and the type of body that it takes (checked before the handler runs; the rest is `BadRequest`)."""

    handler: Handler
    body: Any = None


@dataclass(frozen=True, slots=True)
class QuickMethod:
    """A method whose handler waits for nothing, and so is answered without a task of its own."""

    handler: QuickHandler
    body: Any = None


Answer = Callable[[Reply | Exception], None]
LaterHandler = Callable[[Request, Answer], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class LaterMethod:
    """A method that is answered later, without a task that waits: its handler is given what to call with the answer,
    which it does once, at the latest soon after the deadline. It returns what is called if nobody wants one any more.
    """

    handler: LaterHandler
    body: Any = None


Methods = Mapping[str, Method | QuickMethod | LaterMethod]


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
    ) -> UnderWay: ...  # fmt: skip
