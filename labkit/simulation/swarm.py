"""A swarm in memory and in virtual time: real servers, a node and a session for trainers, on a simulated network.

`experiments/convergence` trains over such a swarm.
"""

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
from labkit.server.config import ServerConfig
from labkit.server.executor import InlineCompute
from labkit.server.serving import serve_experts
from labkit.simulation.lockstep import Lockstep
from labkit.simulation.network import SimNetwork
from labkit.wire.security import Identity

# Declarations live long: a run takes hours of virtual time, and the DHT is not what is measured.
SIMULATED_NODE_CONFIG = NodeConfig(
    dht=DHTConfig(republish_period=600.0, refresh_period=3600.0),
    directory=DirectoryConfig(ttl=1800.0, refresh=300.0),
)


@dataclass(frozen=True)
class SimulatedSwarm:
    """An open simulated swarm. MoE layers find it by the name of its session."""

    node: Node
    session: Session
    lockstep: Lockstep  # runs trainers
    faults: list[Faults] = field(default_factory=list)  # one for each server

    def set_faults(self, latency: float | None = None, loss: float | None = None) -> None:
        """Set the faults of every server.

        Args:
            latency: Mean of an exponential delay of each answer, in virtual seconds; None leaves it as it is.
            loss: Share of calls that get no answer; None leaves it as it is.
        """
        for faults in self.faults:
            faults.set(latency, loss)


@asynccontextmanager
async def open_simulated_swarm(
    network: SimNetwork,
    servers: Sequence[ServerConfig],
    *,
    seed: int = 0,
    name: str = "simulated",
    node_config: NodeConfig = SIMULATED_NODE_CONFIG,
    client_config: NodeConfig | None = None,
    duration: Callable[[str, str, int], float] | None = None,
    emit: Emit = ignore,
) -> AsyncIterator[SimulatedSwarm]:
    """Start servers, one after the other, and a node that calls them. They stop at the end of the block.

    Args:
        network: The network between them.
        servers: The servers.
        seed: Of their identities and faults.
        name: The name by which MoE layers find the swarm.
        node_config: Of every node.
        client_config: Of the node that calls, if it is another.
        duration: Returns the virtual seconds that a batch takes, of `(uid, direction, rows)`; by default none.
        emit: Receives the events of calls, but not those of servers.
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
        async with open_node(
            network, Identity(draw.randbytes(32)), client_config or node_config, join=first, emit=emit
        ) as node:
            lockstep = Lockstep()
            session = Session(name, lockstep, node.directory, ExpertClient(node.client, node.directory, emit), emit)
            open_session(session)
            try:
                yield SimulatedSwarm(node, session, lockstep, all_faults)
            finally:
                close_session(session)
                lockstep.close()
        nursery.cancel_scope.cancel()
