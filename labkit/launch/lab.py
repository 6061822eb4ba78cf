"""The lab: what the lab thread of a swarm holds. Its node runs here, and local servers are started in it.

`Swarm` begins it through its portal. A batch passes by: it enters the lab thread through the same portal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from labkit.contact import Contact
from labkit.events import Emit
from labkit.faults import Faults
from labkit.node import Node, NodeConfig, open_node
from labkit.portal import Portal
from labkit.wire.rpc_types import Methods
from labkit.wire.security import Admission, Identity
from labkit.wire.zmq_transport import ZmqNetwork, open_network


@dataclass(frozen=True)
class Lab:
    """Where local servers live: the lab thread of a swarm and what it holds.

    Args:
        portal: The way into the lab thread.
        nursery: The tasks of local servers and of the view.
        network: The network that all nodes of the lab thread share.
        node: The swarm's own node.
        faults: What servers inject when they begin.
        emit: Gets the events of the lab thread.
        announced: Contacts of the node at which it was tried whether this machine reaches it.
    """

    portal: Portal
    nursery: trio.Nursery
    network: ZmqNetwork
    node: Node
    faults: Faults
    emit: Emit
    announced: set[Contact] = field(default_factory=set)


async def run_lab(
    portal: Portal,
    identity: Identity,
    config: NodeConfig,
    *,
    join: Sequence[Contact],
    methods: Methods,
    admission: Admission,
    faults: Faults,
    emit: Emit,
    task_status: trio.TaskStatus[Lab],
) -> None:
    """Run a swarm's node in the lab thread until cancelled. Ready, with the lab, when the node has joined.

    Args:
        portal: The portal of this lab thread.
        identity: The node's keys.
        config: Where the node listens, and its limits.
        join: Nodes of the swarm to join; none for a new swarm.
        methods: What the node answers besides the DHT's calls.
        admission: Who may connect.
        faults: What local servers inject when they begin.
        emit: Gets the events.
        task_status: Told when the lab is ready.

    Raises:
        JoinError: The swarm cannot be joined.
    """
    async with (
        open_network(config.limits.frames) as network,
        open_node(network, identity, config, join=join, methods=methods, admission=admission, emit=emit) as node,
        trio.open_nursery() as nursery,
    ):
        task_status.started(Lab(portal, nursery, network, node, faults, emit))
        await trio.sleep_forever()
