"""What one node has to do with relays: it may be one, and it may need one. `node` has a `Relaying` in each node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from labkit.contact import Contact
from labkit.dht.node import DHTNode
from labkit.errors import RequestRefused
from labkit.events import Emit, RelayChanged, ignore
from labkit.reachability import Reach
from labkit.relay import messages
from labkit.relay.crossing import PassageFinder
from labkit.relay.finding import keep_relay_declared
from labkit.relay.keeper import Move, RelayKeeper
from labkit.relay.limits import RelayLimits
from labkit.relay.messages import Reserved, ReserveFor
from labkit.relay.neighbours import Shortcuts
from labkit.relay.passages import PassageServer
from labkit.relay.reservation import RESERVE_TIMEOUT
from labkit.relay.server import RelayServer
from labkit.whereabouts import Whereabouts
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_types import AsyncMethod, Methods, Reply, Request
from labkit.wire.transport import Endpoint, Network

NEIGHBOURS_PERIOD = 10.0  # seconds between two looks for nodes of the same network that are relayed, too
TRY_PERIOD = 60.0  # seconds between two questions whether others reach a relayed node directly


class Relaying:
    """A node as a relay, and as one that may need a relay.

    Args:
        network: Where the node listens.
        endpoint: Its endpoint.
        client: Its own, for calls.
        limits: With them, it relays for others, within them.
        joined: The nodes through which the node joins, which may be relays.
        emit: Gets a `RelayChanged` when a node cannot be called, for lack of a relay between IPv4 and IPv6.

    Attributes:
        server: The relay that it is, if it is one.
        passages: What lets others through it who have no way to each other, if it is one.
        finder: Finds such passages for the node itself.
        keeper: What keeps it reachable, while it takes no connections itself.
        started_here: The keys of servers that were started here, for which the node asks relays that do not admit them.
    """

    def __init__(
        self, network: Network, endpoint: Endpoint, client: Client, limits: RelayLimits | None,
        joined: Sequence[Contact] = (), emit: Emit = ignore,
    ) -> None:  # fmt: skip
        self.server = None if limits is None else RelayServer(limits, encrypts=endpoint.contact.secure)
        self.passages = (
            None if self.server is None else PassageServer(self.server, endpoint, lambda: self.keeper is None)
        )
        self.finder = PassageFinder(client, joined, emit)
        if network.tcp:
            endpoint.find_passage = self.finder.find
        self.keeper: RelayKeeper | None = None
        self.started_here: set[bytes] = set()
        self._client = client
        self._looked = trio.Event()  # set when there has been a relay, or none was found
        self._network = network
        self._endpoint = endpoint

    @property
    def methods(self) -> Methods:
        """The methods that the node answers, by name."""
        others = {} if self.server is None else self.server.methods
        passages = {} if self.passages is None else self.passages.methods
        return {messages.RESERVE_FOR: AsyncMethod(self.rpc_reserve_for, ReserveFor), **others, **passages}

    async def rpc_reserve_for(self, request: Request) -> Reply:
        """Reserve a port at a relay for a server that was started here, whose key a private swarm does not know."""
        body: ReserveFor = request.body
        key = body.reserve.key
        if key not in self.started_here or request.peer.key not in (None, key) or not body.relay.is_safe:
            raise RequestRefused("a node asks relays only for servers that it has started")
        reply = await self._client.call(
            body.relay, messages.RESERVE, body.reserve, returns=Reserved, timeout=RESERVE_TIMEOUT
        )
        return Reply(reply.body)

    @property
    def relay(self) -> Contact | None:
        """The relay through which others reach the node now; None if they need none, or there is none."""
        return None if self.keeper is None else self.keeper.relay

    @property
    def lost(self) -> bool:
        """Whether others reach the node through a relay only, and there is none."""
        return self.keeper is not None and self.keeper.relay is None

    @property
    def words(self) -> str:
        """What is to be said of it: who relays for it, or for how many it relays. Empty if there is nothing to say."""
        said = [self._words_of_being_called, self.finder.problem or self._words_of_calling, self._words_of_relaying]
        return "; ".join(filter(None, said))

    @property
    def _words_of_being_called(self) -> str:
        if self.keeper is None:
            return ""
        relay = self.keeper.relay
        if relay is None:
            return self.keeper.problem or "it takes no connections itself, and looks for a relay"
        return f"it takes no connections itself: relayed by {relay.endpoint}"

    @property
    def _words_of_calling(self) -> str:
        called, relay = self.finder.called, self.finder.relay
        if not called or relay is None:
            return ""
        return f"{_nodes(called)} to which it has no way itself it calls through the relay {relay.endpoint}"

    @property
    def _words_of_relaying(self) -> str:
        if self.server is None or self.passages is None:
            return ""
        targets = len(self.passages.targets)
        passages = f"; {_nodes(targets)} others call through it who have no way there" if targets else ""
        return f"relays for {_nodes(len(self.server.clients))}{passages}"

    # ------------------------------------------------------------ for others

    async def run_server(
        self,
        dht: DHTNode,
        whereabouts: Whereabouts,
        ports: Sequence[int] = (),
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Relay for others, if the node is to, until cancelled.

        Args:
            dht: The node's own, where others find it.
            whereabouts: Knows whether others reach the node: else it is no relay.
            ports: The ports that the relay may use; by default any.
            task_status: Told when it is ready.

        Raises:
            LabkitError: It cannot listen.
        """
        server = self.server
        if server is None:
            task_status.started()
            return

        def is_reached() -> bool:
            return self.keeper is None and whereabouts.now.state is not Reach.NO

        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, self._endpoint.bound[0], ports)
            if self.passages is not None:
                await nursery.start(self.passages.run)
            nursery.start_soon(keep_relay_declared, dht, lambda: self._endpoint.contact, server, is_reached)
            task_status.started()

    # ------------------------------------------------------------ for the node itself

    async def follow(
        self,
        hidden: bool | None,
        whereabouts: Whereabouts,
        client: Client,
        dht: DHTNode,
        joined: Sequence[Contact],
        move: Move,
        emit: Emit,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Let others reach the node through a relay whenever they do not reach it otherwise, until cancelled.

        Args:
            hidden: Whether they do not, as far as that is known beforehand; False if there is to be no relay ever.
            whereabouts: Knows whether they do.
            client: Makes the calls.
            dht: Where relays are found.
            joined: The nodes through which the node has joined, which may be relays.
            move: Called with the address of the node from now on, and the reason.
            emit: Gets a `RelayChanged` whenever a relay is found or lost.
            task_status: Told when there is a relay, or none was found, or it is not known yet whether one is needed.
        """
        started = False

        def on_change(event: RelayChanged) -> None:
            whereabouts.ask_again()  # also at the same address: its relay is gone, or back
            emit(event)

        while hidden is not False:
            if hidden is None:
                if not started:
                    task_status.started()
                    started = True
                await _until(whereabouts, lambda: whereabouts.now.state is Reach.NO)
            async with trio.open_nursery() as nursery:
                keep = partial(self.keep_relayed, client, dht, joined, move, on_change)
                await nursery.start(keep)
                self._looked.set()
                if not started:
                    task_status.started()
                    started = True
                await self._until_reached_otherwise(whereabouts)
                nursery.cancel_scope.cancel()
            direct = whereabouts.direct
            move(direct.host, direct.port, "it takes connections itself now, and needs no relay any more", direct.also)
            hidden = None
        if not started:
            task_status.started()

    async def _until_reached_otherwise(self, whereabouts: Whereabouts) -> None:
        """Ask others now and then, and whenever something has changed, whether they reach the node without a relay.

        If they do not reach it through the relay either, it takes another one.
        """
        while True:
            with trio.move_on_after(TRY_PERIOD):
                await whereabouts.news.wait()
            if (await whereabouts.try_direct()).state is Reach.YES:
                return
            now = whereabouts.now
            if self.keeper is not None and now.state is Reach.NO and now.contact == self._endpoint.contact:
                self.keeper.reject()

    async def keep_relayed(
        self,
        client: Client,
        dht: DHTNode,
        joined: Sequence[Contact],
        move: Move,
        emit: Callable[[RelayChanged], object],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep a node reachable that takes no connections, until cancelled. See `RelayKeeper` for the arguments.

        Meanwhile the nodes of this process call it directly, and it so calls its neighbours.
        """
        key, own = self._endpoint.contact.key, own_address(self._endpoint.bound)
        keeper = RelayKeeper(client, dht, self._endpoint.contact, own, joined=joined, move=move, emit=emit)
        shortcuts = Shortcuts(client, key, self._network.direct, client.renew)
        before = self._network.direct.get(key)
        self.keeper, self._network.direct[key] = keeper, own
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(keeper.run)
                task_status.started()
                while True:
                    if keeper.relay is not None:
                        await shortcuts.look(keeper.relay)
                    await trio.sleep(NEIGHBOURS_PERIOD)
        finally:
            shortcuts.forget_all()
            self.keeper = None
            if before is None:
                del self._network.direct[key]

    async def settle(self, whereabouts: Whereabouts, timeout: float) -> bool:
        """Wait until it is known whether the node needs a relay, and if so, has one or finds none.

        `timeout`: seconds after which this returns all the same. Returns whether it needs one.
        """
        with trio.move_on_after(timeout):
            await whereabouts.settled.wait()
            if whereabouts.now.state is Reach.NO:
                await self._looked.wait()
        return self.keeper is not None


def _nodes(count: int) -> str:
    return f"{count} {'node' if count == 1 else 'nodes'}"


async def _until(whereabouts: Whereabouts, condition: Callable[[], bool]) -> None:
    while not condition():
        await whereabouts.news.wait()


def own_address(bound: tuple[str, int]) -> tuple[str, int]:
    """Returns where this machine reaches a socket of its own."""
    host, port = bound
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port
