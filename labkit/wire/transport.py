"""The seam between remote calls and the network: a node's endpoint, links from it to other nodes, and their addresses.

On a batch's way this is what `rpc_client` and `rpc_server` talk to. An `Endpoint` and its `Link`s move frames and know
nothing of calls. `wire/zmq_transport` is the real network, `simulation/network` one in memory; one suite of tests
(`tests/test_wire.py`) says what both of them promise.

**Callbacks on the hot path.** A pass through an MoE layer makes many small calls, and a task with a cancel scope for
each of them would cost more than all the rest of the call. So no task waits for a call: the call is begun, and calls a
function when it is done. There is one pattern for this:

    call = client.begin(contact, method, body, done=done, timeout=5.0)  # returns at once, with a `Cancellable`
    call.cancel()  # to give the call up; does nothing if it is done

1. `done` is called once, with the outcome: a value or an exception (a DHT node's calls have None for a failure).
2. It is called in trio's thread, perhaps before `begin` has returned. It must not block.
3. After `cancel` it is not called any more.

`rpc_client.Client.begin`, `ExpertClient.forward` and `backward`, and the DHT's `Peers.begin` and `begin_find` follow
it. On the answering side, the handler of a `rpc_types.CallbackMethod` is given `respond`, to call when it has the
answer, and the server's `Runtime.put` is given `on_result`. A task that needs an outcome waits for it by
`await_callback`, as `Client.call` does.

Order: peers and callbacks, the seam itself, `await_callback`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import trio

from labkit.contact import Address, Contact
from labkit.errors import LabkitError
from labkit.wire.frames import Frame
from labkit.wire.security import Admission, Identity
from labkit.wire.timers import Timers


@dataclass(frozen=True, slots=True)
class Peer:
    """The sender of a request.

    `route` names the connection that it came on, `key` is the public key that the CURVE handshake proved, if there was
    one, and `address` the IP address that the connection comes from; an IPv4 one may be written as ::ffff:10.0.0.7.
    """

    route: bytes
    key: bytes | None = None
    address: str = ""


OnMessage = Callable[[Sequence[Frame]], object]  # called with the frames of a message that arrived over a link
OnEnd = Callable[[LabkitError], object]  # called with the reason why a link has ended
OnRequest = Callable[[Peer, Sequence[Frame]], object]  # called with the sender and the frames of a request
FindPassage = Callable[[Contact], Awaitable[Address | None]]  # where else a node is reached to which there is no way


class Unsent(Protocol):
    """A message that was handed to the network and may not have left this process yet."""

    @property
    def done(self) -> bool:
        """Whether the message has left."""


class Link(Protocol):
    """A connection to one node. It is made in the background, and once: when it breaks, the link has ended."""

    error: LabkitError | None  # why the link has ended; None while it has not

    def send_nowait(self, frames: Sequence[Frame]) -> Unsent | None:
        """Send a message if that is possible at once. Returns None if not.

        Raises `ConnectionLost`, or a kind of it, if the link has ended.
        """

    def when_ready(self, action: Callable[[], object]) -> None:
        """Call `action`, once, when the connection is there and has room. For use after a `send_nowait` that gave None.

        If the link ends before, `on_end` is called, and `action` is not.
        """

    def close(self) -> None:
        """End the connection."""


class Endpoint(Protocol):
    """One node's place on the network."""

    contact: Contact
    bound: tuple[str, int]  # host and port at which it listens
    timers: Timers  # of the network
    most_links: int  # how many links the operating system lets it have
    direct: dict[bytes, tuple[str, int]]  # of the network
    find_passage: FindPassage | None  # asked when there is no way to a node, as if it has no IP version of ours

    def connect(self, contact: Contact, on_message: OnMessage, on_end: OnEnd) -> Link:
        """Make a new link to a node. Returns at once; the connection is made in the background.

        Args:
            contact: The node to connect to.
            on_message: Called with each message that arrives.
            on_end: Called once, after the last message, with the reason why the link has ended.

        Raises:
            ConnectionLost: This node is closing.
        """

    async def find_way(self, contact: Contact) -> Address:
        """Returns the address at which a new link leads to a node, without a passage. Raises `NoWay` if there is none.

        It raises `ConnectionLost` if its name does not resolve.
        """

    def move(self, contact: Contact) -> None:
        """Let others reach this node at another address from now on. Its key stays the same.

        What leads there is not this endpoint's affair: it goes on listening where it did.
        """

    async def serve(self, on_request: OnRequest) -> None:
        """Call `on_request` with each request that arrives, until cancelled."""

    async def send(self, peer: Peer, frames: Sequence[Frame]) -> None:
        """Answer a peer, waiting for room. Raises `ConnectionLost` if the peer is gone."""

    def send_nowait(self, peer: Peer, frames: Sequence[Frame]) -> bool:
        """Answer a peer if that is possible at once. Returns False if there is no room now.

        An answer to a peer that is gone is dropped, and counts as sent.
        """

    def unsent_bytes(self, peer: Peer) -> int:
        """Returns the size of the answers that this peer has not taken yet, in bytes."""

    def unsent_total(self) -> int:
        """Returns the size of the answers that all peers together have not taken yet, in bytes."""


class Network(Protocol):
    """Where nodes listen."""

    tcp: bool  # whether any program can connect to their addresses
    timers: Timers
    direct: dict[bytes, tuple[str, int]]  # where nodes of this machine are called, by key, whatever their contacts say

    def listen(
        self, identity: Identity, address: str = ..., *, announce: str | None = None, secure: bool | None = None,
        admission: Admission | None = None, toward: Sequence[Contact] = (),
    ) -> AbstractAsyncContextManager[Endpoint]:  # fmt: skip
        """Give a node its endpoint for the length of the block. See `ZmqNetwork.listen` for the arguments."""


T = TypeVar("T")


class Cancellable(Protocol):
    """Something that was begun and calls back when it is done: see the head of this module."""

    def cancel(self) -> None:
        """Give it up: it does not call back any more. Does nothing if it is done."""


async def await_callback(begin: Callable[[Callable[[T | Exception], None]], Cancellable]) -> T:
    """Begin something and wait until it calls back. Cancelling the wait cancels it.

    Args:
        begin: Called with `done`; starts the work and returns what can cancel it. `done` is to be called once with the
            outcome, in trio's thread, perhaps before `begin` returns.

    Returns:
        The outcome, if it is no exception.

    Raises:
        Exception: The outcome, if it is one.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task, waits = trio.lowlevel.current_task(), False
    outcome: list[T | Exception] = []

    def done(result: T | Exception) -> None:
        outcome.append(result)
        if waits:
            trio.lowlevel.reschedule(task)

    under_way = begin(done)
    if outcome:
        await trio.lowlevel.cancel_shielded_checkpoint()
    else:
        waits = True

        def abort(_: object) -> trio.lowlevel.Abort:
            under_way.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
    result = outcome.pop()
    if isinstance(result, Exception):
        try:
            raise result
        finally:
            del result  # else this frame, which is in the error's traceback, would hold the error, in a cycle
    return result


async def await_all(beginnings: Sequence[Callable[[Callable[[T], None]], Cancellable]]) -> list[T]:
    """Begin several things at the same time, and wait until all of them have called back: one task for all.

    Cancelling the wait cancels them.

    Args:
        beginnings: Each as `await_callback` takes it.

    Returns:
        Their outcomes, in the order of `beginnings`.
    """
    outcomes: dict[int, T] = {}

    def begin(done: Callable[[None], None]) -> Cancellable:
        def one_done(index: int, outcome: T) -> None:
            outcomes[index] = outcome
            if len(outcomes) == len(beginnings):
                done(None)

        return _Several([begin_one(partial(one_done, index)) for index, begin_one in enumerate(beginnings)])

    if beginnings:
        await await_callback(begin)
    else:
        await trio.lowlevel.checkpoint()
    return [outcomes[index] for index in range(len(beginnings))]


class _Several:
    def __init__(self, under_way: Sequence[Cancellable]) -> None:
        self._under_way = under_way

    def cancel(self) -> None:
        for one in self._under_way:
            one.cancel()
