"""The ports of local servers: which they may listen at, and that one that is started again gets its last one.

No batch passes here.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import trio

from labkit.contact import Contact
from labkit.launch.runners import ServerPlan
from labkit.node import NodeConfig
from labkit.wire.addresses import ports_of, split_address

PORT_TRIES, PORT_INTERVAL = 25, 0.02  # attempts to get the port of the last runner; seconds between two


def server_address(node: NodeConfig, servers: int) -> str:
    """Returns the address at which a swarm's servers listen: like its own node, each at a port of its own.

    Args:
        node: The configuration of the swarm's own node.
        servers: How many servers there will be at the same time.

    Raises:
        ValueError: The node's address has too few ports for them, as one port for several servers.
    """
    host, _, port = node.listen.rpartition(":")
    ports = ports_of(port)
    if ports is None or (len(ports) == 1 and servers == 1):
        return f"{host}:*"
    if len(ports) > servers:
        return node.listen
    first = ports[0]
    last = first + max(servers, 1)
    example = f"{host}:{first}-{last}" if last < 1 << 16 else f"{host}:31000-31099"
    have = "is the one port of the swarm's own node" if len(ports) == 1 else f"has {len(ports)} ports"
    raise ValueError(
        f"listen={node.listen!r} {have}, and {servers} {'server needs' if servers == 1 else 'servers need'} one each "
        f"beside it: start the swarm with a range of at least {servers + 1} ports, such as listen={example!r}, or "
        f"with any that are free: listen='{host}:*'"
    )


async def keep_port(plan: ServerPlan, contact: Contact | None) -> ServerPlan:
    """The plan, with the port of the last runner if that is free, since other nodes know the server by it."""
    if contact is None:
        return plan
    if (allowed := ports_of(split_address(plan.node.listen)[1])) is not None and contact.port not in allowed:
        return plan
    for _ in range(PORT_TRIES):
        if is_free(split_address(plan.node.listen)[0], contact.port):
            listen = f"{plan.node.listen.rpartition(':')[0]}:{contact.port}"
            return replace(plan, node=replace(plan.node, listen=listen))
        await trio.sleep(PORT_INTERVAL)  # the last runner's socket may be closing
    return plan


def is_free(host: str, port: int) -> bool:
    """Whether a server can listen at an address at which an earlier one has listened."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
