"""Relays and hidden nodes, in one line each, for several tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from labkit.contact import Contact
from labkit.dht.protocol import Ping, Pong
from labkit.events import Event
from labkit.node import Node, NodeConfig, open_node
from labkit.relay.limits import RelayLimits
from labkit.relay.passages import PassageServer
from labkit.relay.reservation import hold_reservation
from labkit.relay.server import RelayServer
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_server import serve_rpc
from labkit.wire.rpc_types import AsyncMethod, Reply, SyncMethod
from labkit.wire.security import Admission, Identity
from labkit.wire.transport import Network
from labkit.wire.zmq_transport import open_network
from tests.nodes import changed, echo


@dataclass
class Hidden:
    """A node that takes no connections: `contact` is at a relay, `own` is where it listens."""

    contact: Contact
    own: Contact
    client: Client
    scope: trio.CancelScope
    identity: Identity


@dataclass
class Relay:
    """A relay: its node's contact and the relay itself."""

    network: Network
    contact: Contact
    server: RelayServer
    client: Client
    nursery: trio.Nursery
    passages: PassageServer
    limits: RelayLimits = field(default_factory=RelayLimits)

    async def hide(self, identity: Identity | None = None) -> Hidden:
        """Run a node, which echoes, behind this relay."""
        identity = identity or Identity.generate()
        hidden: Hidden = await self.nursery.start(self._hide, identity)
        return hidden

    async def _hide(self, identity: Identity, *, task_status: trio.TaskStatus[Hidden]) -> None:
        with trio.CancelScope() as scope:
            async with self.network.listen(identity, secure=True) as endpoint, trio.open_nursery() as nursery:
                own, client = endpoint.contact, Client(endpoint)
                ping = SyncMethod(lambda request: Reply(Pong(identity.public_key)), Ping)
                await nursery.start(serve_rpc, endpoint, {"echo": AsyncMethod(echo, object), "dht.ping": ping})
                address = await nursery.start(hold_reservation, client, self.contact, own, (own.host, own.port))
                at_relay = changed(own, host=address.host, port=address.port)
                task_status.started(Hidden(at_relay, own, client, scope, identity))


@asynccontextmanager
async def relaying(limits: RelayLimits | None = None, *, admission: Admission | None = None) -> AsyncIterator[Relay]:
    """Run a relay, and a client elsewhere."""
    async with (
        open_network() as network,
        network.listen(Identity.generate(), secure=True, admission=admission) as endpoint,
        network.listen(Identity.generate()) as elsewhere,
        trio.open_nursery() as nursery,
    ):
        server = RelayServer(limits)
        passages = PassageServer(server, endpoint)
        await nursery.start(serve_rpc, endpoint, {**server.methods, **passages.methods})
        await nursery.start(server.run, "127.0.0.1")
        await nursery.start(passages.run)
        yield Relay(network, endpoint.contact, server, Client(elsewhere), nursery, passages)
        nursery.cancel_scope.cancel()


@dataclass
class RunningNode:
    """A node that can be closed before the others, and its events."""

    node: Node
    scope: trio.CancelScope
    events: Sequence[Event]


async def start_node(
    network: Network, nursery: trio.Nursery, config: NodeConfig | None = None, join: Sequence[Contact] = ()
) -> RunningNode:
    """Run a node in a nursery until its scope is cancelled."""
    events: list[Event] = []

    async def run(*, task_status: trio.TaskStatus[RunningNode]) -> None:
        config_ = config or NodeConfig(secure=True)
        with trio.CancelScope() as scope:
            async with open_node(network, Identity.generate(), config_, join=join, emit=events.append) as node:
                task_status.started(RunningNode(node, scope, events))
                await trio.sleep_forever()

    running: RunningNode = await nursery.start(run)
    return running
