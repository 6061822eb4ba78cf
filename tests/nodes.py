"""What several tests need: a node's worth of wire on a real socket, in one line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio

from labkit.wire.client import Client
from labkit.wire.rpc import Method, Reply, Request, RPCLimits, serve_rpc
from labkit.wire.security import Admission, Identity
from labkit.wire.zeromq import ZmqEndpoint, ZmqNetwork, open_network


async def echo(request: Request) -> Reply:
    return Reply(request.body, request.tensors)


@asynccontextmanager
async def serving(
    network: ZmqNetwork,
    methods: Mapping[str, Method] | None = None,
    *,
    secure: bool | None = None,
    admission: Admission | None = None,
    limits: RPCLimits | None = None,
) -> AsyncIterator[ZmqEndpoint]:
    """A node that answers `methods` (by default an `echo`)."""
    async with (
        network.listen(Identity.generate(), secure=secure, admission=admission) as endpoint,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(serve_rpc, endpoint, methods or {"echo": Method(echo, object)}, limits)
        yield endpoint
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def calling(
    network: ZmqNetwork, identity: Identity | None = None, limits: RPCLimits | None = None
) -> AsyncIterator[Client]:
    """A client with a key of its own."""
    async with network.listen(identity or Identity.generate()) as endpoint, trio.open_nursery() as nursery:
        client = Client(endpoint, limits)
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def server_and_client(
    methods: Mapping[str, Method] | None = None, *, secure: bool | None = None, limits: RPCLimits | None = None
) -> AsyncIterator[tuple[ZmqEndpoint, Client]]:
    """Both of them on a network of their own."""
    async with (
        open_network() as network,
        serving(network, methods, secure=secure, limits=limits) as server,
        calling(network) as client,
    ):
        yield server, client
