"""A swarm in memory, in virtual time: real servers, a node and a session for trainers, on a simulated network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from labkit.client.expert_client import ExpertClient
from labkit.client.session import Session, close_session, open_session
from labkit.contact import Contact
from labkit.dht.node import DHTConfig
from labkit.directory import DirectoryConfig
from labkit.events import Emit, ignore
from labkit.faults import Faults
from labkit.node import Node, NodeConfig, open_node
from labkit.server.executor import InlineCompute
from labkit.server.server import ServerConfig, serve_experts
from labkit.simulation.lockstep import Lockstep
from labkit.simulation.network import SimNetwork
from labkit.wire.security import Identity

# Declarations that live for long: a run takes hours of virtual time, and what is measured is not the DHT.
CALM = NodeConfig(
    dht=DHTConfig(republish_period=600.0, refresh_period=3600.0),
    directory=DirectoryConfig(ttl=1800.0, refresh=300.0),
)


@dataclass(frozen=True)
class SimulatedSwarm:
    """Layers find it by the name of its session. `faults`: one for each server."""

    node: Node
    session: Session
    lockstep: Lockstep
    faults: list[Faults] = field(default_factory=list)

    def set_faults(self, latency: float | None = None, loss: float | None = None) -> None:
        """The mean of an exponential delay in seconds, and the share of calls that get no answer, of every server."""
        for faults in self.faults:
            faults.set(latency, loss)


@asynccontextmanager
async def open_simulated_swarm(
    network: SimNetwork,
    servers: Sequence[ServerConfig],
    *,
    seed: int = 0,
    name: str = "simulated",
    node_config: NodeConfig = CALM,
    duration: Callable[[str, str, int], float] | None = None,
    emit: Emit = ignore,
) -> AsyncIterator[SimulatedSwarm]:
    """Start the servers, one after the other, and a node that calls them, for the length of the block.

    `duration(uid, direction, rows)`: virtual seconds that a batch takes; by default none. `emit`: for the events of
    calls, not of servers.
    """
    draw = random.Random(seed)
    async with trio.open_nursery() as nursery:
        first: list[Contact] = []
        all_faults: list[Faults] = []
        for config in servers:
            all_faults.append(Faults(seed=draw.randrange(1 << 32)))

            serve = partial(
                serve_experts, network, Identity(draw.randbytes(32)), config, node_config, join=tuple(first),
                faults=all_faults[-1], executor=InlineCompute(duration),
            )  # fmt: skip
            contact = await nursery.start(serve)
            first = first or [contact]
        async with open_node(network, Identity(draw.randbytes(32)), node_config, join=first, emit=emit) as node:
            lockstep = Lockstep()
            session = Session(name, lockstep, node.directory, ExpertClient(node.client, node.directory, emit), emit)
            open_session(session)
            try:
                yield SimulatedSwarm(node, session, lockstep, all_faults)
            finally:
                close_session(session)
                lockstep.close()
        nursery.cancel_scope.cancel()
