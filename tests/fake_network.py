"""Many DHT nodes in one process, in virtual time: each has a `Caller` in memory, with latency, and can be killed.

Bodies are encoded and decoded on the way, as on the real wire, so that a node sees only what it could be sent.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio
from torch import Tensor

from labkit.contact import Contact
from labkit.dht import DHTConfig, DHTNode
from labkit.errors import BadReply, BadRequest, DeadlineExceeded, RPCError
from labkit.wire.rpc_types import CONTROL, Reply, Request, SyncMethod
from labkit.wire.transport import Peer


def make_contact(number: int) -> Contact:
    """Returns the contact of a number: always the same, with an id anywhere in the id space."""
    return Contact(hashlib.blake2b(b"%d" % number, digest_size=32).digest(), "127.0.0.1", 1 + number % 65_535)


@asynccontextmanager
async def running(nodes: Sequence[DHTNode]) -> AsyncIterator[None]:
    """Run the background work of nodes for the length of the block."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.run)
        yield
        nursery.cancel_scope.cancel()


def _methods_of(node: DHTNode) -> dict[str, SyncMethod]:
    return {name: method for name, method in node.methods.items() if isinstance(method, SyncMethod)}


class FakeNetwork:
    """The network between the nodes. `latency`: seconds, one way."""

    def __init__(self, latency: float = 0.05) -> None:
        self.latency = latency
        self.methods: dict[bytes, dict[str, SyncMethod]] = {}  # by public key; a node that is not in it does not answer
        self.calls: Counter[str] = Counter()  # by method

    def node(self, number: int, config: DHTConfig | None = None, *, client_only: bool = False) -> DHTNode:
        """Make a node that can call and be called."""
        contact = make_contact(number)
        node = DHTNode(FakeCaller(self, contact), contact, config, client_only=client_only)
        self.methods[contact.key] = _methods_of(node)
        return node

    async def nodes(self, count: int, config: DHTConfig | None = None) -> list[DHTNode]:
        """Make nodes that all have joined through the first."""
        nodes = [self.node(number, config) for number in range(count)]
        for node in nodes[1:]:
            await node.bootstrap([nodes[0].contact])
        return nodes

    def kill(self, *nodes: DHTNode) -> None:
        """Let these nodes answer no more."""
        for node in nodes:
            self.methods.pop(node.contact.key, None)

    def revive(self, node: DHTNode) -> None:
        """Let a node answer again."""
        self.methods[node.contact.key] = _methods_of(node)

    def replace(self, node: DHTNode, method: str, answer: Any) -> None:
        """Let a node answer `method` with this body, whatever it is asked."""

        self.methods[node.contact.key][method] = SyncMethod(lambda request: Reply(answer))


class TaskCaller(ABC):
    """A fake `Caller` that has `call` only: `begin` runs it in a task of its own."""

    @abstractmethod
    async def call(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        returns: Any = Any, timeout: float, lane: str = CONTROL, codec: str = "none",
    ) -> Reply: ...  # fmt: skip

    def begin(self, *args: Any, done: Callable[[Reply | RPCError], object], **options: Any) -> trio.CancelScope:
        scope = trio.CancelScope()

        async def tell() -> None:
            outcome: Reply | RPCError
            with scope:
                try:
                    outcome = await self.call(*args, **options)
                except RPCError as error:
                    outcome = error
                done(outcome)

        trio.lowlevel.spawn_system_task(tell)
        return scope


class FakeCaller(TaskCaller):
    """The calls of one node."""

    def __init__(self, network: FakeNetwork, contact: Contact) -> None:
        self.network = network
        self.contact = contact

    async def call(
        self, contact: Contact, method: str, body: Any = None, tensors: Sequence[Tensor] = (), *,
        returns: Any = Any, timeout: float, lane: str = CONTROL, codec: str = "none",
    ) -> Reply:  # fmt: skip
        network = self.network
        network.calls[method] += 1
        deadline = trio.current_time() + timeout
        sent = msgspec.msgpack.encode(body)
        with trio.move_on_at(deadline):
            await trio.sleep(network.latency)
            served = network.methods.get(contact.key, {}).get(method)
            if served is None:
                await trio.sleep_forever()
            assert served is not None
            try:
                arrived = msgspec.msgpack.decode(sent, type=served.body or Any)
            except msgspec.ValidationError as error:
                raise BadRequest(str(error)) from None
            peer = Peer(self.contact.key, self.contact.key)
            answer = served.handler(Request(method, arrived, (), peer, deadline))
            returned = msgspec.msgpack.encode(answer.body)
            await trio.sleep(network.latency)
            try:
                return Reply(msgspec.msgpack.decode(returned, type=returns))
            except msgspec.ValidationError as error:
                raise BadReply(str(error)) from None
        raise DeadlineExceeded(f"no answer from {contact.endpoint}")
