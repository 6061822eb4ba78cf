"""Promises of the wire and the DHT, tried in virtual time on networks that hypothesis makes up."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from labkit.dht.node import DHTConfig
from labkit.errors import ConnectionLost, DeadlineExceeded, UnknownMethod
from labkit.node import Node, NodeConfig, open_node
from labkit.wire.client import Client
from labkit.wire.latency import exponential
from labkit.wire.methods import Method, Reply, Request
from labkit.wire.security import Identity
from labkit.wire.simnet import SimNetwork, open_simnet
from tests.nodes import calling, serving

REPLICAS = 4
SMALL = NodeConfig(dht=DHTConfig(k=REPLICAS, republish_period=20.0, refresh_period=60.0))
SETTLED = 60.0  # seconds after which each record was republished since the last crash


def in_virtual_time(function: Callable[..., Awaitable[None]], *args: object) -> None:
    trio.run(function, *args, clock=MockClock(autojump_threshold=0))


@dataclass
class Crowd:
    """Nodes on one simulated network."""

    network: SimNetwork
    nodes: list[Node]

    def alive(self, gone: set[int]) -> list[Node]:
        return [node for number, node in enumerate(self.nodes) if number not in gone]


@asynccontextmanager
async def crowd(count: int, seed: int) -> AsyncIterator[Crowd]:
    """So many nodes, that joined one after the other, each through one that was there."""
    draw = random.Random(seed)
    async with open_simnet(seed, latency=exponential(0.02)) as network, trio.open_nursery() as nursery:
        nodes: list[Node] = []

        async def live(task_status: trio.TaskStatus[Node]) -> None:
            join = [draw.choice(nodes).contact] if nodes else []
            async with open_node(network, Identity(draw.randbytes(32)), SMALL, join=join) as node:
                task_status.started(node)
                await trio.sleep_forever()

        while len(nodes) < count:
            nodes.append(await nursery.start(live))
        yield Crowd(network, nodes)
        nursery.cancel_scope.cancel()


async def found_by_all(nodes: list[Node], keys: list[str]) -> bool:
    """Whether each node finds each record."""
    for node in nodes:
        found = await node.dht.get_many(keys)
        if not all(found[key] is not None for key in keys):
            return False
    return True


# ---------------------------------------------------------------- the DHT


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_unexpired_record_is_kept_while_fewer_nodes_crash_than_hold_it(seed: int, data: st.DataObject) -> None:
    waves = data.draw(st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=REPLICAS - 1), min_size=1, max_size=2))

    async def main() -> None:
        async with crowd(10, seed) as swarm:
            keys = [f"key{number}" for number in range(4)]
            for number, key in enumerate(keys):
                await swarm.nodes[number].dht.store(key, b"value", ttl=1000.0)
            gone: set[int] = set()
            for wave in waves:  # between two of them, what was lost of the replicas is made good
                gone |= wave
                swarm.network.unplug(*(swarm.nodes[number].contact for number in wave))
                assert await found_by_all(swarm.alive(gone), keys)
                await trio.sleep(SETTLED)
            assert await found_by_all(swarm.alive(gone), keys)

    in_virtual_time(main)


@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**32 - 1),
    side=st.sets(st.integers(0, 7), min_size=1, max_size=7),
    minutes=st.integers(1, 10),
)
def test_a_partition_heals(seed: int, side: set[int], minutes: int) -> None:
    async def main() -> None:
        async with crowd(8, seed) as swarm:
            here = [swarm.nodes[number] for number in sorted(side)]
            there = swarm.alive(side)
            await here[0].dht.store("before", b"value", ttl=10_000.0)
            swarm.network.partition([node.contact for node in here], [node.contact for node in there])
            await trio.sleep(60.0 * minutes)
            await here[-1].dht.store("here", b"value", ttl=10_000.0)
            await there[-1].dht.store("there", b"value", ttl=10_000.0)
            swarm.network.heal()
            await trio.sleep(300.0)
            assert await found_by_all(swarm.nodes, ["before", "here", "there"])

    in_virtual_time(main)


# ---------------------------------------------------------------- calls


@asynccontextmanager
async def unreliable(seed: int, loss: float) -> AsyncIterator[tuple[SimNetwork, Client, Callable[[], Awaitable[None]]]]:
    """A client and a server that takes its time, and the way to call it once."""
    draw = random.Random(seed)

    async def slow(request: Request) -> Reply:
        await trio.sleep(draw.expovariate(2.0))
        return Reply()

    async with (
        open_simnet(seed, latency=exponential(0.3), loss=loss) as network,
        serving(network, {"slow": Method(slow)}) as server,
        calling(network) as client,
    ):

        async def call() -> None:
            timeout, started = draw.expovariate(1.0), trio.current_time()
            try:
                await client.call(server.contact, "slow", timeout=timeout)
            except DeadlineExceeded:
                assert trio.current_time() - started <= timeout + 1e-9
            except ConnectionLost:
                pass
            assert trio.current_time() - started <= timeout + 1e-9

        yield network, client, call


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.floats(0, 0.5),
    outages=st.lists(st.floats(0, 10), max_size=4),
)
def test_no_call_outlives_its_deadline(seed: int, loss: float, outages: list[float]) -> None:
    async def main() -> None:
        async with unreliable(seed, loss) as (network, client, call):

            async def caller() -> None:
                for _ in range(10):
                    await call()

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(caller)
                for pause in outages:
                    await trio.sleep(pause)
                    network.unplug(client.endpoint.contact)
                    await trio.sleep(pause / 2)
                    network.heal()

    in_virtual_time(main)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), times=st.lists(st.floats(0, 2), min_size=1, max_size=30))
def test_a_cancelled_call_leaves_nothing_behind(seed: int, times: list[float]) -> None:
    async def main() -> None:
        handled = 0
        ended = 0

        async def forever(request: Request) -> Reply:
            nonlocal handled, ended
            handled += 1
            try:
                await trio.sleep_forever()
            finally:
                ended += 1
            return Reply()

        async with (
            open_simnet(seed, latency=exponential(0.3)) as network,
            serving(network, {"forever": Method(forever)}) as server,
            calling(network) as client,
        ):
            before = trio.lowlevel.current_statistics().tasks_living

            async def cancelled(after: float) -> None:
                with trio.move_on_after(after):
                    await client.call(server.contact, "forever", timeout=100.0)
                    raise AssertionError("nobody answers")

            async with trio.open_nursery() as nursery:
                for after in times:
                    nursery.start_soon(cancelled, after)
            await trio.sleep(30.0)  # a word of it reaches the server
            assert handled == ended
            assert trio.lowlevel.current_statistics().tasks_living == before
            with pytest.raises(UnknownMethod):  # and the connection is as good as new
                await client.call(server.contact, "unknown", timeout=50.0)

    in_virtual_time(main)
