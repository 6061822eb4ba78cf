"""How much a relay does for others: bounds for each client and in all, and its times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from labkit.suggest import suggest_fields


@suggest_fields
@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a node does for nodes that take no connections themselves.

    A connection holds at most 512 KiB of a relay's memory.

    Args:
        clients: How many nodes it relays for. Each has one port.
        clients_per_member: How many of them may be one member of the swarm and the servers
            that it has started.
        connections: How many connections are relayed at the same time, in all; fewer if the
            system lets a process open less than four files for each.
        connections_per_client: How many of them may be one node's.
        connections_per_caller: How many of a node's connections may come from one address.
        passages: To how many nodes it gives passages for others that have no way to them, as
            between IPv4 and IPv6. Each has one port, and as many connections as a client.
        passages_per_member: How many of them may be one member's.
        waiting_per_client: How many callers of a node may wait for it to fetch them.
        mb_per_s: How many megabytes may pass in a second, in all; by default as many as can.
        idle_timeout: Seconds without a byte after which a connection is closed. Those of
            labkit are never silent for so long.

    Raises:
        ValueError: A number is not above 0.
    """

    clients: int = 64
    clients_per_member: int = 32
    connections: int = 1024
    connections_per_client: int = 256
    connections_per_caller: int = 64
    waiting_per_client: int = 32
    passages: int = 256
    passages_per_member: int = 64
    mb_per_s: float | None = None
    idle_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is None and name == "mb_per_s":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: a number above 0")

    @property
    def bytes_per_s(self) -> float:
        """How many bytes may pass in a second."""
        return math.inf if self.mb_per_s is None else self.mb_per_s * 1e6
