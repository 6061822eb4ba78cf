"""What one node has to do with relays: it may be one, and it may need one. `node` has a `Relaying` in each node."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from labkit.contact import Contact
from labkit.dht.node import DHTNode
from labkit.events import Emit
from labkit.relay.finding import keep_relay_declared
from labkit.relay.keeper import Move, RelayKeeper
from labkit.relay.limits import RelayLimits
from labkit.relay.server import RelayServer
from labkit.wire.rpc_types import Caller, Methods
from labkit.wire.transport import Endpoint, Network


class Relaying:
    """A node as a relay, and as one that may need a relay.

    Args:
        network: Where the node listens.
        endpoint: Its endpoint.
        limits: With them, it relays for others, within them.

    Attributes:
        server: The relay that it is, if it is one.
        keeper: What keeps it reachable, while it takes no connections itself.
    """

    def __init__(self, network: Network, endpoint: Endpoint, limits: RelayLimits | None) -> None:
        self.server = None if limits is None else RelayServer(limits, encrypts=endpoint.contact.secure)
        self.keeper: RelayKeeper | None = None
        self._network = network
        self._endpoint = endpoint

    @property
    def methods(self) -> Methods:
        """The methods that the node answers as a relay."""
        return {} if self.server is None else self.server.methods

    @property
    def relay(self) -> Contact | None:
        """The relay through which others reach the node now; None if they need none, or there is none."""
        return None if self.keeper is None else self.keeper.relay

    @property
    def words(self) -> str:
        """What is to be said of it: who relays for it, or for how many it relays. Empty if there is nothing to say."""
        if self.keeper is not None:
            relay = self.keeper.relay
            return f"relayed by {relay.endpoint}" if relay is not None else self.keeper.problem
        if self.server is None:
            return ""
        clients = len(self.server.clients)
        return f"relays for {clients} {'node' if clients == 1 else 'nodes'}"

    async def run_server(self, dht: DHTNode, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relay for others, if the node is to, until cancelled."""
        if self.server is None:
            task_status.started()
            return
        async with trio.open_nursery() as nursery:
            await nursery.start(self.server.run, self._endpoint.bound[0])
            nursery.start_soon(keep_relay_declared, dht, lambda: self._endpoint.contact, self.server)
            task_status.started()

    async def keep_relayed(
        self,
        caller: Caller,
        dht: DHTNode,
        joined: Sequence[Contact],
        move: Move,
        emit: Emit,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep a node reachable that takes no connections, until cancelled. See `RelayKeeper` for the arguments.

        Meanwhile the nodes of this process call it directly.
        """
        key, own = self._endpoint.contact.key, own_address(self._endpoint.bound)
        self.keeper = RelayKeeper(caller, dht, self._endpoint.contact, own, joined=joined, move=move, emit=emit)
        self._network.direct[key] = own
        try:
            await self.keeper.run(task_status=task_status)
        finally:
            self.keeper = None
            del self._network.direct[key]


def own_address(bound: tuple[str, int]) -> tuple[str, int]:
    """Returns where this machine reaches a socket of its own."""
    host, port = bound
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port
