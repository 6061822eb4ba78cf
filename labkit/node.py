"""A node of a swarm: an endpoint, a client for calls, a DHT node, and the directory of experts on top of them.

Servers and notebooks are both nodes. A server adds methods of its own; a notebook that only trains adds none.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import trio

from labkit.contact import Address, Contact, is_loopback
from labkit.dht.node import DHTConfig, DHTNode
from labkit.directory import Directory, DirectoryConfig
from labkit.directory.genuine import is_genuine
from labkit.errors import JoinError
from labkit.events import AddressChanged, Emit, ignore
from labkit.joining import check_reachable
from labkit.reachability import CallBack
from labkit.relay.limits import RelayLimits
from labkit.relay.relaying import Relaying, own_address
from labkit.suggest import suggest_fields
from labkit.whereabouts import Whereabouts
from labkit.wire.addresses import LOOPBACK, announced_address, ports_of, split_address
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_server import serve_rpc
from labkit.wire.rpc_types import Methods, RPCLimits
from labkit.wire.security import Admission, Identity, must_encrypt
from labkit.wire.transport import Endpoint, Network

logger = logging.getLogger(__name__)

MakeMethods = Callable[[Client, DHTNode, Directory], Methods]
BOOTSTRAP_ATTEMPTS = 3  # since a busy node may be late once


@suggest_fields
@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Where a node listens and how it behaves.

    Args:
        listen: The address to listen at, `tcp://host:port`; port `*` for any that is free, `31000-31099` for a range,
            of which a node and each of its servers take one.
        announce: The `host` or `host:port` that others should use, where that differs (see `ZmqNetwork.listen`).
        secure: Whether connections are encrypted; by default wherever that is needed.
        relay: With it, the node relays for nodes that take no connections, within these limits.
        hidden: Whether it takes no connections itself, and so is reached through a relay that it finds; by default it
            asks others whether they reach it. If true, it needs no relay any more once they do; if false, it never
            looks for one.
        dht: How its DHT node behaves.
        directory: How experts are declared and cached.
        limits: Limits of its calls.

    Raises:
        ValueError: An address is none, or a node that takes no connections is to relay.
    """

    listen: str = LOOPBACK
    announce: str | None = None
    secure: bool | None = None
    relay: RelayLimits | None = None
    hidden: bool | None = None
    dht: DHTConfig = field(default_factory=DHTConfig)
    directory: DirectoryConfig = field(default_factory=DirectoryConfig)
    limits: RPCLimits = field(default_factory=RPCLimits)

    def __post_init__(self) -> None:
        split_address(self.listen)
        if self.announce is not None:
            announced_address(self.announce, "127.0.0.1", 0)
        if self.hidden and self.relay is not None:
            raise ValueError("a node that takes no connections cannot relay for others: leave out hidden or relay")


def check_config(config: NodeConfig, *, private: bool) -> None:
    """Check where a node is to listen, before it does. Raises `ValueError`, as `ZmqNetwork.listen` would.

    `private`: whether only some may connect to it.
    """
    host, _ = split_address(config.listen)
    public = host if config.announce is None else announced_address(config.announce, host, 0)[0]
    must_encrypt(config.secure, host if is_loopback(public) else public, Admission(() if private else None))


@dataclass(frozen=True, slots=True)
class Node:
    """A running node."""

    identity: Identity
    endpoint: Endpoint
    client: Client
    dht: DHTNode
    directory: Directory
    whereabouts: Whereabouts
    relaying: Relaying
    emit: Emit = ignore

    @property
    def contact(self) -> Contact:
        """The contact at which others reach this node."""
        return self.endpoint.contact

    def move(self, host: str, port: int, reason: str = "", also: Sequence[Address] = ()) -> Contact:
        """Let others reach this node at another address from now on, as behind a relay or in another network.

        The nodes that know it are told in the background, and its experts are declared anew at once. What leads to the
        address is not its affair: it goes on listening where it did. Does nothing if that is its address already.

        Args:
            host: The host that others call: a name or an IP address.
            port: The port that they call.
            reason: Why, in words, for the event.
            also: Further IP addresses, with ports, at which it is reached.

        Returns:
            Its contact from now on.

        Raises:
            ValueError: It is no address, or the node does not encrypt and others would call it from other machines.
        """
        before = self.contact
        contact = Contact(before.key, host, port, before.secure, tuple(also))
        if contact == before:
            return before
        if not contact.is_safe:
            raise ValueError(
                f"a node that does not encrypt cannot move to {contact.endpoint}: beyond this machine every connection "
                "is encrypted; start it with secure=True"
            )
        self.endpoint.move(contact)
        self.dht.move(contact)
        self.directory.declare_anew()
        self.emit(AddressChanged(contact=contact, before=before.endpoint, reason=reason))
        return contact


@asynccontextmanager
async def open_node(
    network: Network,
    identity: Identity,
    config: NodeConfig | None = None,
    *,
    join: Sequence[Contact] = (),
    methods: Methods | MakeMethods | None = None,
    admission: Admission | None = None,
    emit: Emit = ignore,
) -> AsyncIterator[Node]:
    """Run a node for the length of the block.

    Args:
        network: Where it listens.
        identity: Its keys.
        config: How it behaves.
        join: Nodes of the swarm to join; one that answers is enough. Without any, it is the first of a swarm.
        methods: Methods that it offers beside those of the DHT, by name; or a function that returns them, of what they
            need of the node: its client, its DHT node and its directory.
        admission: Who may connect; by default anybody.
        emit: Called with the events of its directory.

    Raises:
        JoinError: None of the nodes in `join` answered; the text is about the first.
    """
    config = config or NodeConfig()
    async with network.listen(
        identity,
        config.listen,
        announce=config.announce,
        secure=config.secure,
        admission=admission,
        toward=join,
    ) as endpoint:
        client = Client(endpoint, config.limits)
        dht = DHTNode(client, endpoint.contact, config.dht, is_genuine=is_genuine)
        directory = Directory(dht, config.directory, emit, identity.sign)
        relaying = Relaying(network, endpoint, client, config.relay, join, emit)
        others = methods(client, dht, directory) if callable(methods) else methods or {}
        offered = {**dht.methods, **CallBack(endpoint).methods, **relaying.methods, **others}
        with _called_directly(network, endpoint, config.announce):
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_rpc, endpoint, offered, config.limits)
                await nursery.start(dht.run)
                await nursery.start(directory.run)
                nursery.start_soon(relaying.finder.run, dht, dht.peers.blacklist.forgive)
                await _join(network, client, dht, join, identity)
                whereabouts = Whereabouts(client, dht, config.listen, config.announce, join, emit)
                node = Node(identity, endpoint, client, dht, directory, whereabouts, relaying, emit)
                if config.relay is not None and (note := note_on_relay_ports(config.listen)):
                    logger.warning("%s", note)
                await nursery.start(relaying.run_server, dht, whereabouts, relay_ports(config.listen))
                if network.tcp:
                    nursery.start_soon(whereabouts.run, node.move, directory.declare_anew)
                    await nursery.start(relaying.follow, config.hidden, whereabouts, client, dht, join, node.move, emit)
                yield node
                nursery.cancel_scope.cancel()


@contextmanager
def _called_directly(network: Network, endpoint: Endpoint, announce: str | None) -> Iterator[None]:
    """Let this machine call a node where it listens, if it announces another address: not every router leads back."""
    key = endpoint.contact.key
    if not network.tcp or announce is None:
        yield
        return
    network.direct[key] = own_address(endpoint.bound)
    try:
        yield
    finally:
        network.direct.pop(key, None)


def relay_ports(listen: str) -> Sequence[int]:
    """The ports that a relay may use beside the node's own, if that has a range of them; empty for any."""
    ports = ports_of(split_address(listen)[1])
    return () if ports is None or len(ports) == 1 else ports


def note_on_relay_ports(listen: str) -> str:
    """What who starts a relay at one port is to know, which a firewall may let through alone; else empty."""
    host, port = split_address(listen)
    ports = ports_of(port)
    if ports is None or len(ports) > 1 or is_loopback(host):
        return ""
    return (
        f"this relay listens at port {ports[0]}, but callers of relayed nodes come to other free ports of this "
        f"host; behind a firewall, open a range of ports and listen there: {listen.rpartition(':')[0]}:31000-31099"
    )


async def _join(
    network: Network, client: Client, dht: DHTNode, contacts: Sequence[Contact], identity: Identity
) -> None:
    if not contacts:
        return
    failures: list[JoinError] = []
    for contact in contacts:
        try:
            tcp = network.tcp and contact.key not in network.direct
            await check_reachable(client, contact, identity.public_key, tcp=tcp)
            break
        except JoinError as error:
            failures.append(error)
    else:
        raise failures[0]
    for _ in range(BOOTSTRAP_ATTEMPTS):
        if await dht.bootstrap(contacts):
            return
    raise JoinError(f"cannot join the swarm at {contact.endpoint}: it answered once, and then no more. Try again")
