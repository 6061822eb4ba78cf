"""The ports of local servers: a server that is started again gets the port of its last runner.

No batch passes here.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import trio

from labkit.contact import Contact
from labkit.launch.runners import ServerPlan
from labkit.wire.addresses import split_address

PORT_TRIES, PORT_INTERVAL = 25, 0.02  # attempts to get the port of the last runner; seconds between two


async def keep_port(plan: ServerPlan, contact: Contact | None) -> ServerPlan:
    """The plan, with the port of the last runner if that is free, since other nodes know the server by it."""
    if contact is None:
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
