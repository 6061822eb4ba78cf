"""Nodes on a real or a simulated network, in one line each, for several tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from labkit.contact import Contact
from labkit.wire.addresses import LOOPBACK
from labkit.wire.rpc_client import Client
from labkit.wire.rpc_server import serve_rpc
from labkit.wire.rpc_types import AsyncMethod, Methods, Reply, Request, RPCLimits
from labkit.wire.security import Admission, Identity
from labkit.wire.transport import Endpoint, Network
from labkit.wire.zmq_transport import open_network

Wire = Callable[..., AbstractAsyncContextManager[Network]]


def changed(contact: Contact, **changes: object) -> Contact:
    """Returns the contact with some fields changed."""
    fields = {name: getattr(contact, name) for name in ("key", "host", "port", "secure")}
    return Contact(**{**fields, **changes})


async def echo(request: Request) -> Reply:
    return Reply(request.body, request.tensors)


@asynccontextmanager
async def serving(
    network: Network,
    methods: Methods | None = None,
    *,
    secure: bool | None = None,
    admission: Admission | None = None,
    limits: RPCLimits | None = None,
    identity: Identity | None = None,
    address: str = LOOPBACK,
) -> AsyncIterator[Endpoint]:
    """Run a node that answers `methods` (by default an `echo`)."""
    async with (
        network.listen(identity or Identity.generate(), address, secure=secure, admission=admission) as endpoint,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(serve_rpc, endpoint, methods or {"echo": AsyncMethod(echo, object)}, limits)
        yield endpoint
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def calling(
    network: Network, identity: Identity | None = None, limits: RPCLimits | None = None, address: str = LOOPBACK
) -> AsyncIterator[Client]:
    """Run a client with a key of its own."""
    async with network.listen(identity or Identity.generate(), address) as endpoint:
        yield Client(endpoint, limits)


@asynccontextmanager
async def server_and_client(
    wire: Wire = open_network,
    methods: Methods | None = None,
    *,
    secure: bool | None = None,
    limits: RPCLimits | None = None,
) -> AsyncIterator[tuple[Endpoint, Client]]:
    """Run a server and a client on a network of their own."""
    async with (
        wire() as network,
        serving(network, methods, secure=secure, limits=limits) as server,
        calling(network) as client,
    ):
        yield server, client
